"""Shards of the encoding cache: safetensors files with several entries each, verified entry by entry.

    <key>/<name>                    tensors of an entry
    __metadata__: lorasmith.encodings = {"format": 1, "encoder": ..., "title": ..., "entries": {<key>: <digest>}}

An entry's digest is the SHA-256 of its encoder, its key, and the names, shapes, dtypes and bytes of its tensors. It is
verified on every read, so a damaged entry is never used, and the others of its shard still are. The file is untrusted:
names in it are compared, never opened, and nothing in it is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.files import atomic_path
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.mapped_files import MappedFile, may_stay_mapped
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.formats.container import Header, check_safetensors, mapped_tensors, serialised

_KEY = "lorasmith.encodings"
_FORMAT = 1
_MAX_TITLE = 200
_NAME = re.compile(r"[\w.\-]{1,100}", re.ASCII)


@dataclass
class Shard:
    """A file of entries, of which only the header has been read."""

    path: Path
    encoder: str  # digest
    title: str  # the encoder's name, for people
    digests: Mapping[str, str]  # by entry key
    header: Header
    _mapped: tuple[MappedFile, dict[str, dict[str, Tensor]]] | None = field(default=None, repr=False)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, memory-mapped, or copied where the system allows no more mappings.

        OSError if the file cannot be opened, ValueError if the entry is damaged.
        """
        file, entries = self._mapped or self._opened()
        tensors = entries.get(key, {})
        if _digest(self.encoder, key, tensors) != self.digests[key]:
            raise ValueError("an entry has other bytes than were written")
        for tensor in tensors.values():
            file.release_pages(tensor)
        return tensors if self._mapped else {name: tensor.clone() for name, tensor in tensors.items()}

    def _opened(self) -> tuple[MappedFile, dict[str, dict[str, Tensor]]]:
        stays = may_stay_mapped()
        file = MappedFile(self.path)
        entries: dict[str, dict[str, Tensor]] = {}
        for place, tensor in mapped_tensors(file, self.header).items():
            key, _, name = place.partition("/")
            entries.setdefault(key, {})[name] = tensor
        if stays:
            self._mapped = file, entries
        return file, entries


def is_digest(text: object) -> bool:
    """Whether `text` is 64 hexadecimal digits, as SHA-256 is written."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def write_shard(path: Path, encoder: str, title: str, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a shard atomically; `entries` are tensors by name, by key. Raises OutputError."""
    digests = {key: _digest(encoder, key, tensors) for key, tensors in entries.items()}
    about = {"format": _FORMAT, "encoder": encoder, "title": title[:_MAX_TITLE], "entries": digests}
    tensors = {f"{key}/{name}": tensor for key, one in entries.items() for name, tensor in one.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for piece in serialised(tensors, {_KEY: json.dumps(about)}):
            file.write(piece)


def read_shard(path: Path) -> Shard | None:
    """A shard whose header is valid; None for another version. Raises DataError if it is missing or damaged."""
    header = check_safetensors(path, DataError)
    try:
        about = parse_foreign_json(header.metadata.get(_KEY, "null"))
        if isinstance(about, dict) and isinstance(about.get("format"), int) and about["format"] != _FORMAT:
            return None
        return Shard(path, *_checked(about), header)
    except ValueError as error:
        raise DataError(f"{path} is no shard of the encoding cache: its header {error}; remove it") from None


def check_entry(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a key or tensor names that a shard cannot hold."""
    if not is_digest(key):
        raise ValueError(f"the key of a cached encoding must be 64 hexadecimal digits, got {key!r}")
    if wrong := [name for name in tensors if not _NAME.fullmatch(name)]:
        raise ValueError(f"names of cached tensors must be letters, digits, '_', '.' and '-', got {wrong[0]!r}")


def _checked(about: Any) -> tuple[str, str, dict[str, str]]:
    """Encoder, title and digests of the entries. Raises ValueError."""
    if not isinstance(about, dict):
        raise ValueError("says nothing of encodings")
    encoder, title, entries = (about.get(name) for name in ("encoder", "title", "entries"))
    if not is_digest(encoder) or not isinstance(title, str) or not isinstance(entries, dict):
        raise ValueError("lacks encoder, title or entries")
    if not all(is_digest(key) and is_digest(digest) for key, digest in entries.items()):
        raise ValueError("has keys that are no digests")
    return str(encoder), title[:_MAX_TITLE], entries


def _digest(encoder: str, key: str, tensors: Mapping[str, Tensor]) -> str:
    return digest_of_tensors(sorted(tensors.items()), beginning=[_FORMAT, encoder, key])
