"""Embedding files, pickled and in safetensors, and prompts that name them."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.folders import Folders
from lorasmith.families.parts.embeddings import EmbeddingFiles, FileKey, Vectors
from lorasmith.formats.container import count_non_finite, serialised
from tests.families.parts.embedding_cases import FILES, WIDTH
from tests.fuzz.datasets import damaged_pickle
from tests.fuzz.engine import Door, FaultError, printed
from tests.fuzz.mutators import damaged_bytes, damaged_safetensors, nasty_text

_PLACES = {"text_encoder": FileKey("clip_l", WIDTH), "text_encoder_2": FileKey("t5xxl", WIDTH)}


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged embedding, found by a prompt."""
    place = folder / "models" / "embeddings"
    place.mkdir(parents=True)
    name, content = rng.choice(sorted(files().items()))
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        content = _shaped(rng) if rng.random() < 0.5 else damaged_safetensors(rng, content)
    else:
        content = damaged_pickle(rng, content) if rng.random() < 0.8 else damaged_bytes(rng, content)
    (place / f"a{suffix}").write_bytes(content)
    return [("read", functools.partial(_read, folder, rng.choice(("a", f"a{suffix}", f"a, {nasty_text(rng)[:50]}"))))]


def _read(folder: Path, name: str) -> str:
    said: list[str] = []
    vectors = Vectors([], EmbeddingFiles(Folders(folder), said.append), _PLACES)
    found: Mapping[str, torch.Tensor] = vectors.named(name) or {}
    for one in found.values():
        if one.ndim != 2 or one.shape[1] != WIDTH or not len(one) or count_non_finite(one):
            raise FaultError("gave vectors that are none", tuple(one.shape))
    vectors.used([f"embedding:{name}"])
    return printed(*said)


def _shaped(rng: random.Random) -> bytes:
    """Vectors of shapes that none have."""
    keys = ("clip_l", "t5xxl", "emp_params", "string_to_param", "bundle_emb.a.clip_l", nasty_text(rng)[:50])
    sizes = (0, 1, WIDTH, WIDTH, 5000)
    tensors: dict[str, Any] = {}
    for key in rng.sample(keys, rng.choice((1, 1, 3))):
        shape = [rng.choice(sizes[:4] if place else sizes) for place in range(rng.choice((0, 1, 2, 2, 3)))]
        dtype = rng.choice((torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64))
        tensors[key] = torch.full(shape, rng.choice((1.0, 1.0, float("nan")))).to(dtype)
    return b"".join(serialised(tensors, {}))


@functools.cache
def files() -> dict[str, bytes]:
    """The bytes of small embeddings of each kind."""
    found = {}
    for name, content in FILES.items():
        file = io.BytesIO()
        if name.endswith(".safetensors"):
            file.write(b"".join(serialised(content, {})))
        else:
            torch.save(content, file)
        found[name] = file.getvalue()
    return found
