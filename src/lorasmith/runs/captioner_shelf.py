"""Captioners: released ones to begin with, and what is in the model folders (`models/captioners/NAME`, a folder of
transformers each).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import nearest
from lorasmith.runs.hub_download import HubFile, files_of

KIND = "captioners"  # of model folders


@dataclass(frozen=True, kw_only=True)
class CaptionerRelease:
    """A released captioner that pages offer to download."""

    name: str  # of `lorasmith models --get`, and of its folder
    title: str
    about: str  # what it says of a picture, in a sentence
    repository: str  # on the hub
    gigabytes: float  # about
    licence: str


CAPTIONER_RELEASES = {
    captioner.name: captioner
    for captioner in (
        CaptionerRelease(
            name="florence-2-base",
            title="Florence-2 base",
            about="A sentence or two on what a picture shows; small enough for a processor.",
            repository="florence-community/Florence-2-base",
            gigabytes=0.5,
            licence="MIT",
        ),
        CaptionerRelease(
            name="florence-2-large",
            title="Florence-2 large",
            about="As the base, with more detail and fewer mistakes.",
            repository="florence-community/Florence-2-large",
            gigabytes=1.6,
            licence="MIT",
        ),
        CaptionerRelease(
            name="blip-large",
            title="BLIP large",
            about="One short and plain sentence.",
            repository="Salesforce/blip-image-captioning-large",
            gigabytes=1.9,
            licence="BSD 3-Clause",
        ),
    )
}


def captioner_folders(folders: Folders) -> dict[str, Path]:
    """The captioners in the model folders by name. `config.json` is the last file of a download."""
    paths: dict[str, Path] = {}
    for root in reversed(folders.roots(KIND)):
        if root.is_dir():
            paths |= {path.name: path for path in sorted(root.iterdir()) if (path / "config.json").is_file()}
    return paths


def named_captioner(folders: Folders, wanted: str) -> str:
    """What `load_captioner` takes: the folder of a captioner in the model folders, or `wanted` as it is."""
    folder = captioner_folders(folders).get(wanted)
    if folder is None and wanted in CAPTIONER_RELEASES and not Path(wanted).exists():
        raise OptionError(f"the captioner {wanted} is not here yet; get it with: lorasmith models --get {wanted}")
    return wanted if folder is None else str(folder)


def captioner_files(folders: Folders, name: str) -> list[HubFile]:
    """The files of a released captioner that are missing; asks the hub. Raises OptionError and HubError."""
    if name not in CAPTIONER_RELEASES:
        raise OptionError(
            f"there is no captioner {name!r} to get{nearest(name, CAPTIONER_RELEASES)}; known are "
            f"{', '.join(CAPTIONER_RELEASES)}"
        )
    files = files_of(CAPTIONER_RELEASES[name].repository, captioner_place(folders, name))
    return [file for file in files if not file.path.exists()]


def captioner_place(folders: Folders, name: str) -> Path:
    """The folder that a captioner is downloaded to."""
    return folders.roots(KIND)[0] / name


def kept_bytes(folders: Folders, name: str) -> int:
    """What an earlier download has left of a captioner that is not whole."""
    place = captioner_place(folders, name)
    return sum(path.stat().st_size for path in place.iterdir() if path.is_file()) if place.is_dir() else 0
