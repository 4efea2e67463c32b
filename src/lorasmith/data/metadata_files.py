"""Captions in metadata files: kohya's `metadata.json`, and the `metadata.*` of Hugging Face's image folders.

    metadata.json, meta_*.json   {"1": {"caption": "a dog", "tags": "beach, sea"}, "sub/2.png": {"caption": "a cat"}}
    metadata.jsonl               {"file_name": "1.png", "text": "a dog"}     a line for each image
    metadata.csv                 file_name,text
    metadata.parquet             the columns file_name and text; needs pyarrow

Names are paths relative to the file's folder, or absolute paths inside it, with or without suffix. The text is in
`text`, `caption` or `prompt`; a list of texts, or several lines for an image, are several captions. kohya's JSON lines
name images by `image_path`, and his tags are appended to the caption after a comma; DiffSynth names images by `image`,
and its `metadata.json` is a list of rows. Images named in it are never opened: captions are looked up by the names of
images that were found. Controls are in the fields of `control_fields`, each a path in the folder or a list of paths.
"""

from __future__ import annotations

import csv
import importlib
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.core.files import read_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import described, printable
from lorasmith.data.captions import MAX_CAPTION, one_line

MAX_CAPTIONS = 100  # of one image

TEXT_COLUMNS = ("text", "caption", "prompt")
NAME_COLUMNS = ("file_name", "image_path")
_PATH_COLUMNS = (*NAME_COLUMNS, "image")


class MetadataError(ValueError):
    """A metadata file cannot be used; the message is a clause without the file.

    `damaged` is True if it may contain captions all the same.
    """

    def __init__(self, reason: str, *, damaged: bool = True) -> None:
        super().__init__(reason)
        self.damaged = damaged


@dataclass(frozen=True)
class Metadata:
    """The captions of a metadata file, by image path relative to its folder, with or without suffix, in NFC."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why an image's captions cannot be used
    outside: list[str] = field(default_factory=list)  # names of files outside the folder
    controls: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of an image, relative to the folder
    lost_controls: dict[str, str] = field(default_factory=dict)  # why an image's controls cannot be used

    def entry(self, key: str) -> str | None:
        """The key of an image of this path in the file; None if it has none."""
        key = unicodedata.normalize("NFC", key)  # some systems store names in other forms than they are typed
        for name in (key, posixpath.splitext(key)[0]):
            if name in self.captions or name in self.refused:
                return name
        return None


def is_metadata_name(name: str) -> bool:
    """Whether a file of this name is expected to contain captions."""
    return name in _HUGGING_FACE or name == "metadata.json" or bool(re.fullmatch(r"meta_.*\.json", name))


def preferred_metadata(names: Iterable[str]) -> str:
    """The metadata file of a folder that is read: Hugging Face's, then kohya's last (meta_cap, …, meta_lat)."""

    def place(name: str) -> tuple[int, str]:
        order = (*_HUGGING_FACE, "metadata.json")
        return (order.index(name), "") if name in order else (len(order), name)

    known = sorted(names, key=place)
    return known[0] if place(known[0])[0] < len(_HUGGING_FACE) + 1 else known[-1]


def control_fields(names: Iterable[str]) -> list[str]:
    """The fields with an image's controls, in order: `control` or `control_path`, with a number for further ones, and
    DiffSynth's `edit_image` and `kontext_images`.
    """
    numbered = ((re.fullmatch(r"control(?:_path)?(?:_([0-9]{1,9}))?", name), name) for name in names)
    found = [(int(match[1] or -1), name) for match, name in numbered if match]
    return [name for _, name in sorted(found)] + [name for name in ("edit_image", "kontext_images") if name in names]


def read_metadata(path: Path) -> Metadata:
    """The captions in a `.json`, `.jsonl`, `.csv` or `.parquet` file. Raises MetadataError."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise MetadataError(f"cannot be read ({error.strerror})") from error
    try:
        rows = _READERS[path.suffix.lower()](content)
        return _collected(rows, [path.parent.absolute(), path.parent.resolve()])
    except MetadataError:
        raise
    except ValueError as error:
        raise MetadataError(str(error)) from error


# name of an image, its captions (a text, a list of them, or None) and its row, which may name controls
Row = tuple[str, Any, Mapping[str, Any]]


def _collected(rows: Iterable[Row], folders: Sequence[Path]) -> Metadata:
    metadata = Metadata()
    for name, value, row in rows:
        key = _inside(name, folders)
        if key is None:
            metadata.outside.append(name)
            continue
        try:
            if controls := tuple(_controls(row, folders)):
                metadata.controls[key] = controls
        except ValueError as error:
            metadata.lost_controls[key] = str(error)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            metadata.refused[key] = "has a caption that is not text"
        elif len(texts) + len(metadata.captions.get(key, ())) > MAX_CAPTIONS:
            metadata.refused[key] = f"has more than {MAX_CAPTIONS} captions"
        elif any(len(text) > 4 * MAX_CAPTION or len(one_line(text)) > MAX_CAPTION for text in texts):
            metadata.refused[key] = f"has a caption of more than {MAX_CAPTION:,} characters"
        elif any("\x00" in text for text in texts):
            metadata.refused[key] = "has a caption that is not text, as it holds zero bytes"
        else:
            metadata.captions[key] = (*metadata.captions.get(key, ()), *(text for text in texts if text.strip()))
    return metadata


def _inside(name: str, folders: Sequence[Path]) -> str | None:
    """A file's path relative to its folder, which is given under several paths; None if it is outside."""
    path = unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
    for folder in folders:
        base = f"{unicodedata.normalize('NFC', folder.as_posix()).rstrip('/')}/"
        if path.startswith(base):
            path = path.removeprefix(base)
            break
    return None if path in (".", "..") or path.startswith(("../", "/")) or re.match("[A-Za-z]:/", path) else path


def _json_rows(content: bytes) -> Iterator[Row]:
    value = parse_foreign_json(_text(content))
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        yield from _listed_rows(enumerate(value, start=1), "entry")
        return
    if not isinstance(value, dict) or not value or not all(isinstance(row, dict) for row in value.values()):
        raise MetadataError('holds no captions by image, such as {"1.png": {"caption": "a dog"}}', damaged=False)
    for name, entry in value.items():
        yield name, _kohya(entry), entry


def _controls(row: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[str]:
    """Paths of a row's controls relative to its folder. ValueError for what is no path, or outside of the folder."""
    for key in control_fields(row):
        paths = row[key] if isinstance(row[key], list) else [row[key] or None]
        for control in paths:
            if control is None:  # as rows of tables have it that lack a control
                continue
            if not isinstance(control, str) or not control or "\x00" in control:
                raise ValueError(f"its {key} is {described(control)}, not a path; write the control's name")
            if (path := _inside(control, folders)) is None:
                raise ValueError(f"its control {control} is outside of the folder; copy it into the folder")
            yield path


def _kohya(entry: Mapping[str, Any]) -> Any:
    """Captions of an entry, its tags appended to each."""
    text = next((entry[column] for column in ("caption", *TEXT_COLUMNS) if entry.get(column)), None)
    tags = entry.get("tags")
    tags = ", ".join(tags) if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) else tags
    if not tags or not isinstance(tags, str):
        return text or tags or None
    if isinstance(text, list):
        return [f"{caption}, {tags}" if isinstance(caption, str) else caption for caption in text]
    return f"{text}, {tags}" if isinstance(text, str) else text or tags


def _json_line_rows(content: bytes) -> Iterator[Row]:
    yield from _listed_rows(_json_lines(content), "line")


def _json_lines(content: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_foreign_json(line)
        except ValueError as error:
            raise ValueError(f"{error} in line {number}") from error


def _listed_rows(entries: Iterable[tuple[int, Any]], what: str) -> Iterator[Row]:
    named = False
    for number, entry in entries:
        name = (
            next((entry[column] for column in _PATH_COLUMNS if column in entry), None)
            if isinstance(entry, dict)
            else None
        )
        if not isinstance(name, str):
            raise MetadataError(f"has no file_name in {what} {number}", damaged=named)
        named = True
        yield name, _kohya(entry), entry


def _csv_rows(content: bytes) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(content), newline=""), restkey="")
    try:
        columns = reader.fieldnames or ()
        name, text = _columns(columns)
        for row in reader:
            if row.get(name) is None or row.get(text) is None:
                raise ValueError(f"has too few values in line {reader.line_num}")
            yield row[name], row[text], row
    except csv.Error as error:
        raise ValueError(f"is not valid CSV ({error})") from error


def _parquet_rows(content: bytes) -> Iterator[Row]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MetadataError("needs pyarrow, which is not installed; run pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        columns = file.schema_arrow.names
        name, text = _columns(columns)
        wanted = [name, text, *control_fields(columns)]
        chunks = [*_chunks(file, wanted)]
        # A value that is repeated takes no bytes, and one of a list neither.
        if (count := sum(chunk.num_values for chunk in chunks)) > _MAX_VALUES:
            raise ValueError(f"has {count:,} values in {', '.join(wanted[:3])}, and {_MAX_VALUES:,} are the most")
        if sum(chunk.total_uncompressed_size for chunk in chunks) > _MAX_UNPACKED:
            raise ValueError(f"unpacks to more than {_MAX_UNPACKED:,} bytes")
        largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
        read = 0
        for batch in file.iter_batches(batch_size=max(1, min(256, _BATCH // max(1, largest))), columns=wanted):
            if (read := read + batch.nbytes) > _MAX_UNPACKED:
                raise ValueError(f"unpacks to more than {_MAX_UNPACKED:,} bytes")
            for row in batch.to_pylist():
                if not isinstance(row[name], str):
                    raise ValueError("has a row without file_name")
                yield row[name], row[text], row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"is not valid parquet ({printable(error, limit=100)})") from error


def _chunks(file: Any, wanted: Sequence[str]) -> Iterator[Any]:
    """What a parquet file says of the chunks of columns, and of those in them."""
    places = [
        place
        for place in range(len(file.schema))
        if (path := file.schema.column(place).path) in wanted or path.partition(".")[0] in wanted
    ]
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        yield from (group.column(place) for place in places)


def _columns(columns: Iterable[str]) -> tuple[str, str]:
    known = list(columns)
    name = next((column for column in _PATH_COLUMNS if column in known), None)
    if name is None:
        raise MetadataError("has no column file_name", damaged=False)
    text = next((column for column in TEXT_COLUMNS if column in known), None)
    if text is None:
        raise MetadataError(f"has none of the columns {', '.join(TEXT_COLUMNS)}", damaged=False)
    return name, text


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8") from None


# Of parquet, which has repeated values as their number, and a long one once.
_MAX_VALUES, _MAX_UNPACKED, _BATCH = 1_000_000, 2**29, 2**26
_HUGGING_FACE = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_READERS: Mapping[str, Callable[[bytes], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _json_line_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}

METADATA_SUFFIXES = frozenset(_READERS)
