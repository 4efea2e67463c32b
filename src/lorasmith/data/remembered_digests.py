"""Digests of weights and of whole files, kept by the files' path, size and times.

encodings/digests/<key>.json        the digest, and a checksum
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.mapped_files import FileState, file_state
from lorasmith.data.cache_folder import ensure_private
from lorasmith.data.cache_shards import is_digest
from lorasmith.data.encoding_cache import DIGESTS, EncodingCache, key_of
from lorasmith.formats.metadata import sha256_file


class RememberedDigests:
    """Digests of weights, in the folder of an encoding cache; files that cannot be read or written are ignored.

    `hashed` is called after each tensor that is hashed, with (tensors done, total).
    """

    def __init__(self, cache: EncodingCache, hashed: Callable[[int, int], None] | None = None) -> None:
        self.folder = cache.folder / DIGESTS
        self.hashed = hashed
        self._is_on = cache.limit_bytes > 0

    def find(self, key: str) -> str | None:
        path = self.folder / f"{key}.json"
        if not self._is_on or path.is_symlink():
            return None
        try:
            kept = parse_foreign_json(read_regular(path, at_most=_MAX_REMEMBERED_BYTES))
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or not is_digest(digest := kept.get("digest")):
            return None
        return str(digest) if kept.get("check") == key_of(key=key, digest=digest) else None

    def keep(self, key: str, digest: str) -> None:
        if self._is_on:
            text = json.dumps({"digest": digest, "check": key_of(key=key, digest=digest)})
            with contextlib.suppress(LorasmithError, OSError):
                ensure_private(self.folder.parent)
                write_atomic(self.folder / f"{key}.json", text)


def file_sha256(path: Path, remembered: RememberedDigests, *, each_block: Callable[[], object]) -> str:
    """SHA-256 of a file, 64 hex digits; the file is read only if it changed since it was last hashed."""
    state = file_state(path)
    key = key_of(what="file", file=state)
    if are_settled([state]) and (kept := remembered.find(key)) is not None:
        return kept
    digest = sha256_file(path, each_block=each_block)
    if are_settled([state]):
        remembered.keep(key, digest)
    return digest


def are_settled(files: Iterable[FileState]) -> bool:
    """Whether files are unchanged since they were mapped, and any further change would change their times."""
    try:
        unchanged = all(file_state(Path(one.path)) == one for one in files)
    except OSError:
        return False
    return unchanged and all(max(one.modified, one.changed) < time.time_ns() - _SETTLED_NS for one in files)


_MAX_REMEMBERED_BYTES = 10_000
_SETTLED_NS = 3 * 10**9  # after a change; file systems count time in steps of up to two seconds
