"""Captions for the images of a folder, written beside them by a captioner."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.core.errors import DataError
from lorasmith.core.files import write_atomic
from lorasmith.core.printable import sentence
from lorasmith.data.captions import MAX_CAPTION, one_line, with_trigger
from lorasmith.data.data_config import CAPTION_SUFFIXES
from lorasmith.data.folder_listing import LINK, Skipped, list_folders
from lorasmith.data.image_files import ImageError, image_suffixes, open_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImagesToCaption:
    """The images of a folder, by what captioning does with them."""

    images: tuple[Path, ...]  # without a caption, or all of them if captions are replaced
    kept: tuple[Path, ...]  # have a caption, which stays
    sharing: tuple[tuple[Path, Path], ...]  # (image, other image whose caption file would be the same)
    refused: tuple[tuple[Path, str], ...]  # (link out of the folder that is not followed, reason)


@dataclass(frozen=True)
class Captioned:
    """The result of `caption_images`."""

    written: tuple[Path, ...]  # caption files
    empty: tuple[Path, ...]  # images for which the captioner returned nothing
    failed: tuple[tuple[Path, str], ...]  # (image, why it could not be read or captioned)
    left: int  # number of images not reached


def images_to_caption(
    folder: Path, *, overwrite: bool = False, recursive: bool = False, follow_links: bool = False
) -> ImagesToCaption:
    """The images of a folder and of its `<repeats>_<name>` folders, as training reads them; DataError if none."""
    refused: Skipped = []
    paths = _images(folder, recursive, follow_links, refused)
    if not paths:
        if refused:
            raise DataError(f"{folder} holds no images but links: {refused[0][0].name} {refused[0][1]}")
        known = ", ".join(sorted(suffix[1:] for suffix in image_suffixes()))
        inside = "" if recursive else ", or give --recursive for the folders inside"
        raise DataError(f"{folder} holds no images; put some in it ({known}){inside}")
    kept, sharing = [], []
    first: dict[str, Path] = {}  # file systems may ignore case
    for image in paths:
        if not overwrite and any(os.path.lexists(image.with_suffix(suffix)) for suffix in CAPTION_SUFFIXES):
            kept.append(image)
        elif (other := first.setdefault(str(_caption_file(image)).casefold(), image)) is not image:
            sharing.append((image, other))
    return ImagesToCaption(tuple(first.values()), tuple(kept), tuple(sharing), tuple(refused))


def caption_images(
    images: Sequence[Path],
    captioner: Callable[[Image.Image], str],
    *,
    trigger: str = "",
    progress: Callable[[int, int, str], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Captioned:
    """Write a caption file beside each image, atomically, as soon as there is a caption; OutputError if that fails.

    `trigger` is put in front of captions that lack it. `progress` receives (images done, total, name of the image).
    """
    written: list[Path] = []
    empty: list[Path] = []
    failed: list[tuple[Path, str]] = []
    done = 0
    for done, image in enumerate(images, start=1):
        if cancelled():
            done -= 1
            break
        caption, fault = made_caption(image, captioner, trigger)
        if fault:
            failed.append((image, fault))
        elif caption:
            write_atomic(_caption_file(image), f"{caption}\n")
            written.append(_caption_file(image))
        else:
            empty.append(image)
        if progress:
            progress(done, len(images), image.name)
    return Captioned(tuple(written), tuple(empty), tuple(failed), len(images) - done)


def made_caption(image: Path, captioner: Callable[[Image.Image], str], trigger: str = "") -> tuple[str, str]:
    """What a captioner says of an image, with a trigger in front that it lacks, or nothing; and why it failed."""
    try:
        caption = _caption(image, captioner)
    except ImageError as error:
        return "", error.reason
    except Exception as error:  # of the captioner, which is third-party code
        return "", sentence(f"makes the captioner fail ({type(error).__name__}: {error})")
    return with_trigger(caption, trigger) if caption else "", ""


def _caption(image: Path, captioner: Callable[[Image.Image], str]) -> str:
    answer: object = captioner(open_image(image))
    if not isinstance(answer, str):
        raise TypeError(f"a caption must be text, got {type(answer).__name__}")
    if len(caption := one_line(answer)) > MAX_CAPTION:
        raise ValueError(f"a caption must have at most {MAX_CAPTION:,} characters, got {len(caption):,}")
    return caption


def _caption_file(image: Path) -> Path:
    return image.with_suffix(CAPTION_SUFFIXES[0])


def _images(folder: Path, recursive: bool, follow_links: bool, refused: Skipped) -> list[Path]:
    """Images in natural order, those of inner folders last; links that are not followed are appended to `refused`."""
    found = []
    for listed in list_folders(str(folder), recursive=recursive, follow_links=follow_links):
        for name in listed.images:
            if listed.refuses(name):
                refused.append((listed.file(name), LINK))
            else:
                found.append(listed.file(name))
    return found
