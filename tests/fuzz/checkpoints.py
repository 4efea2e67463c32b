"""Base models in safetensors: whole checkpoints by their headers, and parts of one with their weights."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.loading import recognise
from lorasmith.families.locating import BUILT_IN, located
from lorasmith.families.model_search import recognised_file
from lorasmith.families.part_loading import load_autoencoder, load_text_encoder
from lorasmith.formats.container import read_safetensors, serialised
from lorasmith.toolbox.model_files import open_model
from tests.fuzz.engine import Door
from tests.fuzz.mutators import damaged_bytes, damaged_json, json_bytes, nasty_text, unaligned_safetensors


@dataclass(frozen=True)
class _Part:
    """A small file: its tensors and metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged checkpoint, listed and recognised; a part is loaded."""
    path = folder / "x.safetensors"
    if rng.random() < 0.5:
        _write_header(rng, path)
    else:
        _write_part(rng, path)
    listed: Door = ("list", lambda: recognised_file(path, "").fault)
    loaded: list[Door] = [
        ("recognise", lambda: recognise(OriginalCheckpoint(path)).title),
        ("read", functools.partial(_read, path)),
        ("load text encoder", lambda: load_text_encoder([path], "stable_diffusion").title),
        ("load autoencoder", lambda: load_autoencoder(path).title),
        ("open", lambda: str(open_model(path).path)[:0]),
    ]
    return [listed, loaded[rng.choice((0, 0, 1, 1, 1, 2, 2, 3, 3, 4))]]  # the last takes a quarter of a second


def _read(path: Path) -> None:
    checkpoint = OriginalCheckpoint(path)
    for _, weight in checkpoint.file.read(list(checkpoint.file.shapes)):
        if not isinstance(weight, Tensor):
            weight.weight()


def _write_header(rng: random.Random, path: Path) -> None:
    """The built-in model's header, damaged, before zeros that take no room on the disk."""
    tensors, metadata = _built_in()
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, one in tensors.items():
        size = one.numel() * one.element_size()
        header[name] = {"dtype": "F32", "shape": list(one.shape), "data_offsets": [offset, offset + size]}
        offset += size
    if rng.random() < 0.5:
        entry = "lorasmith.architecture"
        header["__metadata__"][entry] = json_bytes(damaged_json(rng, json.loads(metadata[entry]))).decode()
    elif rng.random() < 0.7:
        offset = _resized(rng, header)
    else:
        header = damaged_json(rng, header)
    text = json_bytes(header)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _resized(rng: random.Random, header: dict[str, Any]) -> int:
    """Give some tensors other names and shapes, in a consistent header; returns the size of the body."""
    names = [name for name in header if name != "__metadata__"]
    for name in rng.sample(names, rng.choice((1, 1, 5, 50))):
        shape = header[name]["shape"]
        match rng.randrange(4):
            case 0:
                header[nasty_text(rng)[:300]] = header.pop(name)
            case 1:
                del header[name]
            case _:
                at = rng.randrange(len(shape) + 1)
                shape[at : at + 1] = rng.choice(([], [1], [0], [3], [7, 7], [1] * 60))
    offset = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        size = 4 * math.prod(entry["shape"])
        entry["data_offsets"] = [offset, offset + size]
        offset += size
    return offset


def _write_part(rng: random.Random, path: Path) -> None:
    part = rng.choice(parts())
    tensors, metadata = dict(part.tensors), dict(part.metadata)
    for _ in range(rng.choice((0, 1, 1, 3))):
        name = rng.choice(list(tensors))
        one = tensors[name]
        match rng.randrange(7):
            case 0:
                del tensors[name]
            case 5:
                tensors[name] = one.new_zeros(rng.choice(((0, 0), (0, *one.shape[1:]), (*one.shape[:-1], 0))))
            case 1:
                tensors[nasty_text(rng)[:300] or "x"] = tensors.pop(name)
            case 2:
                tensors[name] = one.reshape(-1)[: rng.choice((0, 1, 5))].contiguous()
            case 3:
                tensors[name] = one[None].contiguous()
            case 4:
                tensors[name] = one.to(rng.choice((torch.float16, torch.float64, torch.int8, torch.bool)))
            case _:
                tensors[f"{name.rpartition('.')[0]}.comfy_quant"] = _as_bytes(
                    damaged_json(rng, {"format": "int8_tensorwise"})
                )
    for name in metadata:
        metadata[name] = json_bytes(damaged_json(rng, json.loads(metadata[name]))).decode()
    data = b"".join(serialised(tensors, metadata))
    if rng.random() < 0.15:
        data = unaligned_safetensors(data, rng.choice((1, 2, 3, 5)))
    path.write_bytes(damaged_bytes(rng, data[:20000]) + data[20000:] if rng.random() < 0.3 else data)


def _as_bytes(value: Any) -> Tensor:
    return torch.tensor(list(json_bytes(value)), dtype=torch.uint8)


@functools.cache
def _built_in() -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    return read_safetensors(located(BUILT_IN))


@functools.cache
def parts() -> Sequence[_Part]:
    """The built-in model's text encoder and autoencoder, the first also with packed weights."""
    tensors, metadata = _built_in()
    text = {name: one for name, one in tensors.items() if name.startswith("cond_stage_model.")}
    image = {name: one for name, one in tensors.items() if name.startswith("first_stage_model.")}
    packed: dict[str, Tensor] = {}
    layers = {}
    for name, one in text.items():
        if name.endswith("proj.weight"):
            stem = name.removesuffix(".weight")
            packed |= {name: one.to(torch.float8_e4m3fn), f"{stem}.weight_scale": torch.ones(())}
            layers[stem] = {"format": "float8_e4m3fn"}
        else:
            packed[name] = one
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    architecture = {"lorasmith.architecture": metadata["lorasmith.architecture"]}
    return [_Part(text, architecture), _Part(image, architecture), _Part(packed, said)]
