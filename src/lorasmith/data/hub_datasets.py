"""Datasets of the package `datasets` as folders of images: each picture's bytes unchanged, and a `metadata.jsonl`.

A dataset has a column of images, and its captions in a column `text`, `caption` or `prompt`, as text or lists of text.
Columns of images named as `control_fields` has it are controls, an image or a list of them each.
Its folder is written once, and found again by the dataset's fingerprint.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.errors import DataError, LorasmithError
from lorasmith.core.files import ensure_folder, folder_once, is_regular, read_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.data.folder_listing import LINK, control_folder
from lorasmith.data.image_files import image_suffixes
from lorasmith.data.metadata_files import TEXT_COLUMNS, control_fields

_LAYOUT = 1  # raised with changes of the folders that are written


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return is_regular(path / _SPLITS) or all(is_regular(path / name) for name in _PARTS)


def unpacked_folder(path: Path, cache: Path, *, follow_links: bool = False) -> Path:
    """The folder of images, in `cache`, of a dataset that `save_to_disk` wrote; of several splits, `train`.

    Pictures that the dataset references by path are left out: an untrusted dataset may reference any file. DataError if
    `datasets` is not installed, or the dataset cannot be read or has no images; OutputError if images cannot be
    written.
    """
    folder = _split_folder(path.resolve())
    files = [folder / name for name in (*_PARTS, *_data_files(folder))]
    if not follow_links and any(not Path(os.path.realpath(file)).is_relative_to(path.resolve()) for file in files):
        raise _unreadable(folder, f"a file of it {LINK}")
    if "::" in str(folder) or "://" in str(folder):  # URLs to `datasets`
        raise DataError(f"a dataset must be in a folder without :: and :// in its path, got {folder}; move it")
    datasets = _package()
    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
        # A forged fingerprint must not select the images of another dataset, so the files count as well.
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return _written(loaded, cache, state, at_most=sum(size for _, size, _ in state))
    except LorasmithError:
        raise
    except Exception as error:  # of any kind, as the files are untrusted, rows included
        raise _unreadable(folder, printable(error, limit=100)) from error


def dataset_folder(dataset: object, cache: Path) -> Path:
    """The folder, in `cache`, of a `datasets.Dataset` with a column of images. Raises DataError or OutputError."""
    if not isinstance(dataset, _package().Dataset):
        raise DataError(f"a dataset must be a datasets.Dataset, got {type(dataset).__name__}; choose a split of it")
    return _written(dataset, cache, [], at_most=None)


_SPLITS = "dataset_dict.json"
_PARTS = ("state.json", "dataset_info.json")


def _package() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise DataError("datasets needs the package of this name; run pip install datasets") from None


def _split_folder(folder: Path) -> Path:
    if not is_regular(folder / _SPLITS):
        return folder
    splits = _names(folder / _SPLITS, lambda content: content["splits"])
    if "train" in splits:
        return folder / "train"
    if len(splits) != 1:
        raise DataError(f"dataset {folder} has no split train; name the folder of one of its splits")
    return folder / splits[0]


def _data_files(folder: Path) -> list[str]:
    return _names(folder / _PARTS[0], lambda content: [entry["filename"] for entry in content["_data_files"]])


def _names(file: Path, listed: Callable[[Any], list[str]]) -> list[str]:
    """Files that a dataset's JSON file lists. Raises DataError if one is outside its folder."""
    try:
        names = listed(parse_foreign_json(read_regular(file)))
        if not all(Path(name).name == name != ".." for name in names):
            raise ValueError("names files in other folders")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(file.parent, f"{file.name}: {printable(error, limit=60)}") from error
    return names


def _unreadable(folder: Path, reason: str) -> DataError:
    return DataError(f"dataset {folder} cannot be read ({reason}); save it again with save_to_disk")


def _written(dataset: Any, cache: Path, key: object, *, at_most: int | None) -> Path:
    """The folder of a dataset in the cache, written completely or not at all."""
    columns = _columns(dataset)
    identity = json.dumps([_LAYOUT, dataset._fingerprint, *columns, key])
    target = cache / f"dataset-{hashlib.sha256(identity.encode('utf-8', 'replace')).hexdigest()[:24]}"
    return folder_once(
        target,
        f"the images of a dataset are being written to {target}",
        lambda temporary: _write(dataset, *columns, temporary, at_most=at_most),
    )


def _columns(dataset: Any) -> tuple[str, str | None, list[str]]:
    """The columns of images, captions and controls."""
    datasets = _package()
    features = dict(dataset.features or {})
    controls = [name for name in control_fields(features) if _undecoded(features[name]) is not None]
    images = [
        name for name, feature in features.items() if isinstance(feature, datasets.Image) and name not in controls
    ]
    if not images:
        known = printable(", ".join(features) or "none", limit=100)
        raise DataError(f"a dataset must have a column of images, got the columns {known}; use cast_column")
    text = next((name for name in TEXT_COLUMNS if name in features), None)
    return "image" if "image" in images else images[0], text, controls


def _undecoded(feature: Any) -> Any:
    """A feature of images, or of lists of them, whose pictures are bytes; None for others."""
    image = _package().Image
    if isinstance(feature, image):
        return image(decode=False)
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if not isinstance(inner, image):
        return None
    return [image(decode=False)] if isinstance(feature, list) else type(feature)(image(decode=False))


def _write(
    dataset: Any, image: str, text: str | None, controls: Sequence[str], folder: Path, *, at_most: int | None
) -> None:
    """Write pictures and their controls, the latter into folders `control`, `control_1`, ..., then `metadata.jsonl`.

    `at_most` is the size in bytes of the files, which hold all pictures and captions and do not compress them; None for
    the caller's own dataset, whose pictures may be files elsewhere.
    """
    if at_most is not None and len(dataset) > at_most:
        raise ValueError("it has more rows than its files have bytes")
    rows = dataset.select_columns([image, *([text] if text else []), *controls]).with_format(None)
    for column in (image, *controls):
        rows = rows.cast_column(column, _undecoded(rows.features[column]))
    digits = len(str(len(rows)))
    lines = []
    written = 0
    for number, row in enumerate(rows):
        stem = f"{number:0{digits}}"
        cells = [row[image]]
        for column in controls:
            cells += row[column] if isinstance(row[column], list) else [row[column]]
        contents = [_content(cell or {}, outside=at_most is None) for cell in cells]
        texts = row[text] if text else None
        written += sum(len(content or b"") for content in contents)
        written += sum(len(text) for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str))
        if at_most is not None and written > at_most:
            raise ValueError("it has more bytes of pictures and captions than its files")
        name = f"row {number} without a picture"  # an entry without an image, which the scan reports
        if contents[0] is not None:
            name = f"{stem}{_suffix(contents[0])}"
            (folder / name).write_bytes(contents[0])
        for place, content in enumerate(content for content in contents[1:] if content is not None):
            beside = ensure_folder(folder / control_folder(place))
            (beside / f"{stem}{_suffix(content)}").write_bytes(content)
        lines.append(json.dumps({"file_name": name, "text": texts}))
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _content(picture: Any, *, outside: bool) -> bytes | None:
    if (content := picture.get("bytes")) is not None:
        return bytes(content)
    if not outside or not picture.get("path"):
        return None
    try:
        return read_regular(Path(picture["path"]))
    except OSError as error:
        raise DataError(f"image {picture['path']} of a dataset cannot be read ({error.strerror})") from error


def _suffix(content: bytes) -> str:
    """The suffix of a picture's format; `.png` for invalid pictures, which the scan then reports."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as picture:
            suffix = f".{(picture.format or '').lower()}"
    except Exception:  # Pillow's readers raise anything for damaged bytes
        return ".png"
    return suffix if suffix in image_suffixes() else ".png"
