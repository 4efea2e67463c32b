"""Originals of pictures that were cropped by hand: the picture of the dataset is the part, which every program reads.

    input/dog/3.jpg                   the part
    input/dog/.originals/3.jpg        the original
    input/dog/.originals/3.jpg.json   {"original": "3.jpg", "crop": {"x": 0.1, ...}, "sha256": "..."}

The digest is that of the part: the record of another picture, which had the name before, counts for nothing. Every crop
is made from the original, so that a wider one brings back what an earlier one cut.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lorasmith.core.files import Stamp, ensure_folder, is_regular, read_regular, stamp_of, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import typed
from lorasmith.data.image_files import ImageError, file_digest
from lorasmith.server.datasets.dataset_shapes import Crop

FOLDER = ".originals"


@dataclass(frozen=True)
class Original:
    """The original of a cropped picture."""

    path: Path
    crop: Crop  # the part of it that the picture is


@dataclass(frozen=True, kw_only=True)
class _Record:
    original: str
    crop: Crop
    sha256: str


def original_of(picture: Path, stamp: Stamp) -> Original | None:
    """The original of a picture, whose file has this stamp; None if it is not a part of another one."""
    record = _record(picture)
    own = stamp_of(record)
    return _read(picture, record, (*stamp, *own)) if any(own) else None


def keep_original(original: Path, picture: Path, crop: Crop, sha256: str) -> None:
    """Record that a picture, of this digest, is a part of a file in the folder of originals."""
    record = {"original": original.name, "crop": asdict(crop), "sha256": sha256}
    write_atomic(_record(picture), json.dumps(record) + "\n")


def forget_original(picture: Path) -> None:
    """Remove the record of a picture."""
    _record(picture).unlink(missing_ok=True)


def originals_folder(dataset: Path) -> Path:
    """The folder of originals, which is made. Raises OutputError."""
    return ensure_folder(dataset / FOLDER)


def _record(picture: Path) -> Path:
    return picture.parent / FOLDER / f"{picture.name}.json"


@functools.lru_cache(maxsize=4096)
def _read(picture: Path, record: Path, state: tuple[int, ...]) -> Original | None:
    """The original, by a record that may hold anything, cached by the `state` of both files."""
    try:
        found = typed(parse_foreign_json(read_regular(record)), _Record)
        path = record.parent / found.original
        if path.parent != record.parent or not is_regular(path) or file_digest(picture) != found.sha256:
            return None
    except (OSError, ValueError, ImageError):
        return None
    return Original(path, found.crop)
