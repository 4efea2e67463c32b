"""The encoding cache: outputs of autoencoders and text encoders, on disk.

    encodings/<digest of the encoder>/<time>-<random>.safetensors      shards
    encodings/digests/<digest>.json                                    digests of weights, see `encoder_digest`

Entries are found by content: the encoder's digest and a key of everything else that the result depends on, so nothing
in the cache becomes stale. Processes share a folder without locks: files are written atomically under unique names, and
two processes that encode the same input leave duplicates. A file that is missing or cannot be removed is not an error.

A shard is a safetensors file of several entries:

    <key>/<name>                    tensors of an entry
    __metadata__: lorasmith.encodings = {"format": 1, "encoder": ..., "title": ..., "entries": {<key>: <digest>}}

An entry's digest is the SHA-256 of its encoder, its key, and the names, shapes, dtypes and bytes of its tensors. It is
verified on every read, so a damaged entry is never used, and the others of its shard still are. Shards are untrusted:
names in them are compared, never opened. Files with other names are neither read nor removed, and links are not
followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import DataError, LorasmithError, OutputError
from lorasmith.core.files import atomic_path, ensure_folder, remove_left
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.mapped_files import MappedFile, may_stay_mapped
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.data.data_config import DataConfig
from lorasmith.formats.container import Header, StoredTensors, check_safetensors, serialised

FOLDER_VARIABLE = "LORASMITH_CACHE_DIR"  # of the user's cache
DIGESTS = "digests"  # folder of remembered digests of weights
SHARD_BYTES = 16 * 2**20  # pending bytes at which a shard is written
SHARD_SECONDS = 5.0
"""Time after which a shard is written, however small: the most that a killed process loses, one encoding aside."""

_USE_SECONDS = 60  # resolution of the time of last use
_SIZE_SECONDS = 60  # between looks at the size of the whole folder
_SHARD_NAME = re.compile(r"\d{20}-[0-9a-f]{16}\.safetensors")
_DIGEST_NAME = re.compile(r"[0-9a-f]{64}\.json")
_KEY = "lorasmith.encodings"
_FORMAT = 1
_MAX_TITLE = 200
_NAME = re.compile(r"[\w.\-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class EncoderSummary:
    """Cache entries of one encoder."""

    encoder: str  # digest
    title: str  # as of the newest entries
    entries: int
    size_bytes: int
    last_used: float  # seconds since 1970, to a minute
    unreadable: int = 0  # files that are damaged or of another version


@dataclass(frozen=True)
class Cleared:
    """Number and total size of the removed files."""

    files: int
    size_bytes: int


class EncodingCache:
    """A folder of encodings, created with the first one.

    Disk errors are reported in `notes`, once, and encoding continues without the cache. Above `limit_bytes` the least
    recently used files are removed, except those that this object has used; 0 stores nothing.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.notes: list[str] = []
        self._used: set[str] = set()
        self._open: Counter[str] = Counter()
        self._can_write = limit_bytes > 0
        self._swept: set[Path] = set()
        self._written = False
        self._size_bytes = 0
        self._sized = -math.inf

    @contextlib.contextmanager
    def entries(self, encoder: str, *, title: str = "") -> Iterator[CacheEntries]:
        """Context with the entries of one encoder, by its digest; new ones are on disk when it exits, also on errors.

        `title` is the encoder's name, for people who list the cache.
        """
        if not is_digest(encoder):
            raise ValueError(f"the digest of an encoder must be 64 hexadecimal digits, got {encoder!r}")
        self._open[encoder] += 1
        entries = CacheEntries(self, encoder, title)
        try:
            yield entries
        finally:
            entries.flush()
            self._open[encoder] -= 1
            self._keep_limit()

    def summary(self) -> list[EncoderSummary]:
        """Every encoder in the cache, the most recently used first."""
        found = []
        for folder in self._folders():
            files = _files(folder, _SHARD_NAME)
            shards = []
            for path, _ in files:
                with contextlib.suppress(LorasmithError):
                    if (shard := read_shard(path)) is not None and shard.encoder == folder.name:
                        shards.append(shard)
            if files:
                found.append(
                    EncoderSummary(
                        encoder=folder.name,
                        title=shards[-1].title if shards else "",
                        entries=len({key for shard in shards for key in shard.digests}),
                        size_bytes=sum(stat.st_size for _, stat in files),
                        last_used=max(stat.st_mtime for _, stat in files),
                        unreadable=len(files) - len(shards),
                    )
                )
        return sorted(found, key=lambda summary: -summary.last_used)

    def clear(self, *, unused_days: float = 0.0) -> Cleared:
        """Remove files not used for a number of days, all by default; files in use on Windows stay."""
        before = time.time() - unused_days * 86400 if unused_days else math.inf
        sizes: list[int] = []
        for folder in self._folders():
            sizes += _cleared(folder, _SHARD_NAME, before)
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        _cleared(self.folder / DIGESTS, _DIGEST_NAME, before)
        return Cleared(len(sizes), sum(sizes))

    def _folders(self) -> list[Path]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(
                    Path(entry.path)
                    for entry in entries
                    if is_digest(entry.name) and entry.is_dir(follow_symlinks=False)
                )
        except OSError:
            return []

    def _index(self, encoder: str) -> list[Shard]:
        """The readable shards of an encoder, the oldest first."""
        folder = self.folder / encoder
        if not self.limit_bytes or folder.is_symlink():
            return []
        shards = []
        for path, _ in _files(folder, _SHARD_NAME):
            try:
                shard = read_shard(path)
            except LorasmithError as error:
                if path.exists():  # else another process has removed it
                    self._note_damage(str(error))
                continue
            if shard is not None and shard.encoder == encoder:
                shards.append(shard)
        return shards

    def _write(self, encoder: str, title: str, entries: Mapping[str, Mapping[str, Tensor]]) -> Shard | None:
        """Write a shard, then enforce the limit; None if it cannot be written."""
        folder = self.folder / encoder
        if not self._can_write or folder.is_symlink():
            return None
        path = folder / f"{time.time_ns():020}-{secrets.token_hex(8)}.safetensors"
        self._used.add(path.name)
        try:
            ensure_private(self.folder)
            try:
                write_shard(path, encoder, title, entries)
            except OutputError:
                if folder.exists():
                    raise
                write_shard(path, encoder, title, entries)  # another process has just removed the empty folder
        except (LorasmithError, OSError) as error:
            self._can_write = False
            self.notes.append(f"Encodings are not cached from here on: {error}.")
            return None
        if folder not in self._swept:
            self._swept.add(folder)
            _cleared(folder, _SHARD_NAME, -math.inf)
        try:
            self._written = True
            self._size_bytes += path.stat().st_size
            self._keep_limit()
            return read_shard(path)
        except (LorasmithError, OSError):  # another process has removed it
            return None

    def _keep_limit(self) -> None:
        """Remove the least recently used shards beyond the limit, except those that this object has used.

        Encoders whose entries are open are skipped: some of theirs will still be read.
        """
        if not self._written:
            return
        # Looking at every file takes longer than a write; what other processes wrote is noticed within a minute.
        if self._size_bytes <= self.limit_bytes and time.monotonic() - self._sized < _SIZE_SECONDS:
            return
        files = [
            (stat.st_mtime, stat.st_size, path)
            for folder in self._folders()
            for path, stat in _files(folder, _SHARD_NAME)
        ]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit_bytes:
                break
            if path.name not in self._used and not self._open[path.parent.name] and _removed(path):
                total -= size
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        self._size_bytes, self._sized = total, time.monotonic()

    def _note_damage(self, what: str) -> None:
        if not any("damaged" in note for note in self.notes):
            self.notes.append(
                f"The encoding cache is damaged, and what is lost is encoded again: {what}. `lorasmith data cache "
                "clear` empties it."
            )


class CacheEntries:
    """The entries of one encoder, from `EncodingCache.entries`; not thread-safe."""

    def __init__(self, cache: EncodingCache, encoder: str, title: str) -> None:
        self._cache = cache
        self._encoder = encoder
        self._title = title
        self._places: dict[str, list[Shard]] = {}
        self._touched: dict[Path, float] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._waiting_bytes = 0
        self._since = 0.0
        for shard in cache._index(encoder):
            self._add(shard)

    def __len__(self) -> int:
        """Number of keys with an entry, some of which may turn out to be damaged."""
        return len(self._places.keys() | self._waiting.keys())

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of an entry, memory-mapped and not to be changed in place; None if it is missing or damaged."""
        if (waiting := self._waiting.get(key)) is not None:
            return {name: tensor.clone() for name, tensor in waiting.items()}
        places = self._places.get(key, [])
        while places:
            shard = places[-1]
            try:
                tensors = shard.read(key)
            except OSError:  # removed by another process, or unreadable
                places.pop()
            except ValueError as error:
                places.pop()
                self._cache._note_damage(f"{shard.path}: {error}")
            else:
                self._cache._used.add(shard.path.name)
                self._touch(shard.path)
                return tensors
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add or replace an entry, copying its tensors (from any device); `key` is from `key_of`.

        It is written with others, after `SHARD_BYTES` or `SHARD_SECONDS` or when the context exits. ValueError for a
        key that is not a digest, or names with other characters than letters, digits, `_`, `.` and `-`.
        """
        if not is_digest(key):
            raise ValueError(f"the key of a cached encoding must be 64 hexadecimal digits, got {key!r}")
        if wrong := [name for name in tensors if not _NAME.fullmatch(name)]:
            raise ValueError(f"names of cached tensors must be letters, digits, '_', '.' and '-', got {wrong[0]!r}")
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[key] = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting_bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write pending entries."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if waiting and (shard := self._cache._write(self._encoder, self._title, waiting)) is not None:
            self._touched[shard.path] = time.time()
            self._add(shard)

    def _add(self, shard: Shard) -> None:
        for key in shard.digests:
            self._places.setdefault(key, []).append(shard)

    def _touch(self, path: Path) -> None:
        """Record the use of a shard in its file's time, once a minute."""
        now = time.time()
        if now - self._touched.get(path, 0.0) > _USE_SECONDS:
            self._touched[path] = now
            with contextlib.suppress(OSError):
                os.utime(path)


def key_of(**values: object) -> str:
    """SHA-256 of keyword values as canonical JSON, 64 hex digits.

    Tuples count as lists. TypeError for values that JSON lacks, ValueError for numbers that are not finite.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_cache(limit_gib: float = DataConfig.cache_limit) -> EncodingCache:
    """The user's cache in `$LORASMITH_CACHE_DIR` or the system's cache folder; disabled without a home folder."""
    limit_bytes = int(limit_gib * 2**30)
    if folder := os.environ.get(FOLDER_VARIABLE, ""):
        return EncodingCache(Path(folder) / "encodings", limit_bytes=limit_bytes)
    try:
        return EncodingCache(_system_cache() / "lorasmith" / "encodings", limit_bytes=limit_bytes)
    except RuntimeError:
        return EncodingCache(Path("encodings"), limit_bytes=0)


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
        for place, tensor in StoredTensors(file, self.header).items():
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
    tensors = {f"{key}/{name}": tensor for key, entry in entries.items() for name, tensor in entry.items()}
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
        raise DataError(f"{path} is not a shard of the encoding cache: its header {error}; remove it") from None


def ensure_private(folder: Path) -> None:
    """Create a folder that only its owner can read, as latents can be decoded to pictures."""
    ensure_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


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


def _system_cache() -> Path:
    """The folder in which programs keep what they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    path = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return path if path.is_absolute() else Path.home() / ".cache"


def _files(folder: Path, name: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    """Regular files whose names match, sorted by name."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):  # another process has removed it
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return sorted(found)


def _removed(path: Path) -> bool:
    """Remove a file; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _cleared(folder: Path, name: re.Pattern[str], before: float) -> list[int]:
    """Remove files last used before a time, and what killed processes have left; sizes of the former in bytes."""
    remove_left(folder)
    return [stat.st_size for path, stat in _files(folder, name) if stat.st_mtime < before and _removed(path)]
