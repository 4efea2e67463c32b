"""Datasets as folders of images in `<base>/input`: their paths, pictures, captions and skipped files.

A dataset is one folder, such as `input/dog`, which `lorasmith train` accepts as well. Links are followed as `Folders`
and `DataConfig.follow_links` allow. Pictures in its subfolders are counted in notes and not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import DataError, OutputError
from lorasmith.core.files import is_folder, is_regular
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.data.captions import CAPTION_SUFFIXES, CaptionError, read_caption_file
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder_listing import Skipped, stem_of
from lorasmith.data.folder_remarks import Remarks
from lorasmith.data.image_files import image_suffixes
from lorasmith.data.source_files import Candidate, candidates
from lorasmith.data.sources import ImageSource


class UnknownFileError(DataError):
    """No such dataset, picture or run."""


def dataset_folder(folders: Folders, name: str, *, to_change: bool = False) -> Path:
    """The folder of a dataset. Raises UnknownFileError, and OutputError for a built-in one `to_change`."""
    if is_name(name):
        own = folders.place("input") / name
        if is_folder(own) and folders.is_here(own):
            return own
        if is_folder(ASSETS / "input" / name):
            if to_change:
                raise OutputError(f"{name} belongs to Lorasmith and stays as it is; make a dataset of your own")
            return ASSETS / "input" / name
    raise UnknownFileError(f"there is no dataset {name!r}; choose one of the list, or make it")


def subfolders(root: Path) -> Iterator[Path]:
    """The folders in a folder, except hidden ones."""
    if is_folder(root):
        yield from (one for one in root.iterdir() if not one.name.startswith(".") and is_folder(one))


def is_builtin(folder: Path) -> bool:
    """Whether a dataset belongs to the package."""
    return folder.is_relative_to(ASSETS)


def is_name(name: str) -> bool:
    """Whether a text is a single path segment."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\x00:")


def pictures_in(folders: Folders, folder: Path) -> tuple[list[Candidate], Skipped, list[str]]:
    """The pictures directly in a folder, its skipped files, and notes."""
    skipped: Skipped = []
    remarks = Remarks()
    config = DataConfig(follow_links=folders.follow_links)
    try:
        found = list(candidates(ImageSource(str(folder)), config, cache=None, skipped=skipped, remarks=remarks))
    except DataError as error:
        return [], [], [str(error)]
    own = [one for one in found if not one.folder.inside]
    inner = {one.folder.inside: 0 for one in found if one.folder.inside}
    for one in found:
        if one.folder.inside:
            inner[one.folder.inside] += 1
    notes = [
        f"{number:,} pictures in the folder {inside} are trained on as well, and not shown here."
        for inside, number in inner.items()
    ]
    real = folder.resolve()
    shown = [one for one in own if stays_in(one.path, real)]
    if len(shown) < len(own):
        use = "trained on, and not shown" if folders.follow_links else "neither trained on nor shown"
        notes.append(f"{len(own) - len(shown):,} pictures are links to other folders: {use} here.")
    return shown, skipped, [*notes, *remarks.sentences()]


def stays_in(path: Path, real: Path) -> bool:
    """Whether a file is inside of a folder when links are resolved."""
    try:
        return path.resolve().is_relative_to(real)
    except (OSError, RuntimeError):
        return False


def picture_of(folder: Path, file: str) -> Path:
    """Raises UnknownFileError."""
    path = folder / file
    if not is_name(file) or path.suffix.lower() not in image_suffixes() or not is_regular(path):
        raise UnknownFileError(f"there is no picture {file!r} in {folder.name}; load the page again")
    if not stays_in(path, folder.resolve()):
        raise UnknownFileError(
            f"{file} in {folder.name} is a link to somewhere else and is not shown; copy the picture"
        )
    return path


def caption_of(one: Candidate) -> tuple[str, str]:
    """The caption of a picture, line by line, and its fault."""
    if one.barred:
        return "", one.barred
    if one.caption_file:
        try:
            caption = read_caption_file(one.folder.file(one.caption_file))
        except CaptionError as error:
            return "", f"has a caption file {error.path.name} that {error.reason}"
        if caption.text:
            return "\n".join(caption.lines), ""
    return "\n".join(one.entry), ""


def caption_file(one: Candidate) -> Path:
    """The path of a picture's caption file, which need not exist."""
    return one.folder.file(one.caption_file or f"{stem_of(one.name)}{CAPTION_SUFFIXES[0]}")
