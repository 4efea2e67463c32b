"""The folders of data sets, by name. The server imports this module, so it imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import DataError, OutputError
from lorasmith.core.files import is_folder
from lorasmith.core.folders import BUILT_IN_BASE, Folders

MASK = ".mask"  # between the stem of a picture and the suffix of its mask


class UnknownFileError(DataError):
    """No such dataset, picture or run."""


def dataset_folder(folders: Folders, name: str, *, to_change: bool = False) -> Path:
    """The folder of a dataset. Raises UnknownFileError, and OutputError for a built-in one `to_change`."""
    if is_name(name):
        own = folders.place("input") / name
        if is_folder(own) and folders.is_here(own):
            return own
        if is_folder(BUILT_IN_BASE / "input" / name):
            if to_change:
                raise OutputError(f"{name} belongs to Lorasmith and stays as it is; make a dataset of your own")
            return BUILT_IN_BASE / "input" / name
    raise UnknownFileError(f"there is no dataset {name!r}; choose one of the list, or make it")


def subfolders(root: Path) -> Iterator[Path]:
    """The folders in a folder, except hidden ones."""
    if is_folder(root):
        yield from (path for path in root.iterdir() if not path.name.startswith(".") and is_folder(path))


def is_builtin(folder: Path) -> bool:
    """Whether a dataset belongs to the package."""
    return folder.is_relative_to(BUILT_IN_BASE)


def is_name(name: str) -> bool:
    """Whether a text is a single path segment."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\x00:")


def stays_in(path: Path, real: Path) -> bool:
    """Whether a file is inside of a folder when links are resolved."""
    try:
        return path.resolve().is_relative_to(real)
    except (OSError, RuntimeError):
        return False
