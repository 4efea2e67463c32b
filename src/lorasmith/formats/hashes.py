"""Hashes by which other programs identify LoRA and model files.

    AutoV1    first 8 hex digits of the SHA-256 of bytes 0x100000 to 0x110000   (A1111, older)
    AutoV2    first 10 hex digits of the SHA-256 of the file                    (Civitai, A1111)
    AutoV3    first 12 hex digits of the SHA-256 of the body                    (Civitai, for LoRA)
    sshs_*    the two hashes in the metadata of kohya's files: over the body, and AutoV1 of the file as it would be
              with nothing but the `ss_` metadata

The body is everything after the safetensors header: it does not change with the metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from lorasmith.core.errors import LoraError, LorasmithError
from lorasmith.core.files import open_regular
from lorasmith.formats.container import LENGTH_BYTES, header_text, serialised


def sha256_file(path: Path, *, each_block: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a whole file, 64 hex digits.

    Args:
        path: the file.
        each_block: called before each MiB; what it raises ends the hashing.
    """
    with open_regular(Path(path)) as file:
        return _rest_digest(file, each_block)


def sha256_body(path: Path, error: type[LorasmithError] = LoraError) -> str:
    """SHA-256 of a safetensors file without its header, 64 hex digits. Raises `error` for other files."""
    text, _ = header_text(Path(path), error)
    with open_regular(Path(path)) as file:
        file.seek(LENGTH_BYTES + len(text))
        return _rest_digest(file)


def autov1(path: Path) -> str:
    """A1111's old hash of a file, 8 hex digits."""
    with open_regular(Path(path)) as file:
        file.seek(_WINDOW.start)
        return hashlib.sha256(file.read(len(_WINDOW))).hexdigest()[:8]


def autov2(path: Path) -> str:
    """Civitai's hash of a file, 10 hex digits."""
    return sha256_file(path)[:10]


def autov3(path: Path) -> str:
    """Civitai's hash of a LoRA's body, 12 hex digits."""
    return sha256_body(path)[:12]


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hash entries of kohya's metadata, for tensors as they are written."""
    return {
        "sshs_model_hash": sshs_model_hash(tensors),
        "sshs_legacy_hash": sshs_legacy_hash(tensors, metadata),
    }


def sshs_model_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the body with these tensors, 64 hex digits."""
    digest = hashlib.sha256()
    pieces = iter(serialised(tensors, {}))
    next(pieces)  # the header
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sshs_legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """AutoV1 of the file with these tensors and the `ss_` part of `metadata`, 8 hex digits."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    digest = hashlib.sha256()
    _window(serialised(tensors, kept), digest.update)
    return digest.hexdigest()[:8]


_WINDOW = range(0x100000, 0x110000)


def _window(pieces: Iterable[bytes], use: Callable[[bytes], None]) -> None:
    """Pass the part of a stream that lies inside the window on to `use`."""
    offset = 0
    for piece in pieces:
        use(piece[max(_WINDOW.start - offset, 0) : max(_WINDOW.stop - offset, 0)])
        offset += len(piece)


def _rest_digest(file: BinaryIO, each_block: Callable[[], object] = lambda: None) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        each_block()
        digest.update(block)
    return digest.hexdigest()
