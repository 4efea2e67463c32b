"""The encoding cache: damaged shards, and damaged memories of digests."""

from __future__ import annotations

import functools
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from lorasmith.data.encoder_digest import RememberedDigests
from lorasmith.data.encoding_cache import FOLDER_VARIABLE, EncodingCache, key_of
from tests.fuzz.engine import Door, FaultError, command, printed
from tests.fuzz.mutators import damaged_bytes, damaged_safetensors

_ENCODER, _OTHER = key_of(encoder=1), key_of(encoder=2)
_DIGEST = key_of(weights=1)
_SHARD = f"{1:020}-{'0' * 16}.safetensors"


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A cache with a damaged shard or memory, read and listed."""
    inside = folder / "encodings"
    shard, memory = made()
    place = inside / rng.choice((_ENCODER, _ENCODER, _ENCODER, _OTHER)) / _SHARD
    place.parent.mkdir(parents=True)
    place.write_bytes(damaged_safetensors(rng, shard))
    (inside / "digests").mkdir()
    (inside / "digests" / f"{_ENCODER}.json").write_bytes(damaged_bytes(rng, memory))
    listed = rng.random() < 0.2
    return [
        ("read", functools.partial(_read, inside)),
        ("digest", functools.partial(_remembered, inside)),
        *([("list command", functools.partial(_listed, folder))] if listed else []),
    ]


def _read(folder: Path) -> str:
    cache = EncodingCache(folder, limit_bytes=2**40)
    for encoder in (_ENCODER, _OTHER):
        with cache.entries(encoder) as entries:
            for number in range(3):
                found = entries.get(key_of(number=number))
                wanted = _value(number)
                if found is not None and not (
                    encoder == _ENCODER
                    and found.keys() == wanted.keys()
                    and all(torch.equal(found[name], one) for name, one in wanted.items())
                ):
                    raise FaultError("gave out what was not written")
    return printed(*cache.notes)


def _remembered(folder: Path) -> None:
    found = RememberedDigests(EncodingCache(folder, limit_bytes=2**40)).find(_ENCODER)
    if found not in (None, _DIGEST):
        raise FaultError("gave out another digest")


def _listed(folder: Path) -> str:
    with patch.dict(os.environ, {FOLDER_VARIABLE: str(folder)}):
        return command("data", "cache", "list")


def _value(number: int) -> dict[str, Tensor]:
    return {"latents": torch.full((4, 8, 8), float(number)), "mask": torch.ones(number, dtype=torch.bool)}


@functools.cache
def made() -> tuple[bytes, bytes]:
    """The bytes of a shard, and of a remembered digest."""
    with tempfile.TemporaryDirectory(prefix="fuzz-cache-") as name:
        cache = EncodingCache(Path(name), limit_bytes=2**40)
        with cache.entries(_ENCODER, title="a model") as entries:
            for number in range(3):
                entries.put(key_of(number=number), _value(number))
        RememberedDigests(cache).keep(_ENCODER, _DIGEST)
        (shard,) = Path(name).rglob("*.safetensors")
        (memory,) = Path(name).rglob("*.json")
        return shard.read_bytes(), memory.read_bytes()
