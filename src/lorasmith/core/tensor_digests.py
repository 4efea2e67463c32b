"""Digests of tensors' names, shapes, dtypes and bytes, independent of device and memory layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_BLOCK_BYTES = 16 * 2**20


def digest_of_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, beginning: object = None, each_block: Callable[[], object] = lambda: None
) -> str:
    """SHA-256 (hex) of named tensors in their order, and of the JSON value `beginning`.

    `each_block` is called before each 16 MiB of a tensor; an exception that it raises ends the hashing.
    """
    digest = hashlib.sha256(json.dumps(beginning).encode())
    for name, tensor in tensors:
        # ASCII in JSON's escapes: any name has bytes, and what follows has the length that shape and dtype say.
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        content = _bytes(tensor)
        for start in range(0, len(content), _BLOCK_BYTES):
            each_block()
            digest.update(content[start : start + _BLOCK_BYTES])
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, not copied if they are contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
