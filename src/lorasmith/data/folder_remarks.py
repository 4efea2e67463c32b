"""Remarks of a scan: those of one kind in one sentence, with their number and an example."""

from __future__ import annotations

from enum import Enum


class Remark(Enum):
    """A kind of remark: the start of its sentence in singular and plural, and the rest of it."""

    LATIN_1 = (
        "caption file is",
        "caption files are",
        "not UTF-8 and read as latin-1, such as {}; check the accents or save as UTF-8",
    )
    SECOND_FILE = (
        "caption file is",
        "caption files are",
        "not used, such as {}, as the image has another one; remove one of them",
    )
    NO_IMAGE = (
        "caption file has",
        "caption files have",
        "no image of the same name, such as {}; rename or remove what is not needed",
    )
    ORIGIN = (
        "file with captions is",
        "files with captions are",
        "not used, such as {}; they are with captions files",
    )
    DIFFERENT = (
        "image has",
        "images have",
        "different captions in a caption file and in a metadata file; {}",
    )
    NO_ENTRY = (
        "entry of metadata files has",
        "entries of metadata files have",
        "no image here, such as {}",
    )
    OUTSIDE = (
        "entry of metadata files is",
        "entries of metadata files are",
        "not used, such as {}, as they name files outside of the folder",
    )
    UNNAMED = (
        "image is",
        "images are",
        "not used, such as {}, as the metadata file does not name them",
    )
    MASKS_OFF = ("mask is", "masks are", "not used, such as {}; they are with masks files")
    MASK = ("mask is", "masks are", "not used, such as {}, as there is no image of the name, or another mask")
    TWICE = ("image is", "images are", "in several sources, such as {}, and counted for each")
    CASE = (
        "image has",
        "images have",
        "the name of another one but for case, such as {}; rename them, as Windows and macOS take them for one",
    )
    LINKS = ("file is a link", "files are links", "to outside of the folder, such as {}")


class Remarks:
    """Remarks, counted by kind."""

    def __init__(self) -> None:
        self._found: dict[Remark, tuple[int, str]] = {}

    def add(self, kind: Remark, example: str, count: int = 1) -> None:
        """Count remarks of a kind, of which the first example is kept."""
        if count:
            before, first = self._found.get(kind, (0, example))
            self._found[kind] = (before + count, first)

    def sentences(self) -> tuple[str, ...]:
        return tuple(_sentence(kind, *self._found[kind]) for kind in Remark if kind in self._found)


def _sentence(kind: Remark, count: int, example: str) -> str:
    one, several, rest = kind.value
    return f"{count:,} {one if count == 1 else several} {rest.replace('{}', example)}"
