"""Embedding files of every kind, and prompts that name them, for ComfyUI and for Lorasmith alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 8


def vectors(number: int, start: int) -> Tensor:
    """(number, WIDTH), a sine of the index."""
    return (
        torch.sin(torch.arange(start, start + number * WIDTH, dtype=torch.float64) * 0.71).reshape(number, -1).float()
    )


FILES: dict[str, Any] = {
    "both.safetensors": {"clip_l": vectors(2, 0), "t5xxl": vectors(2, 50), "qwen3_4b": vectors(2, 90)},
    "onetrainer.safetensors": {"emp_params": vectors(3, 100)},
    "a1111.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(1, 200)}, "name": "a1111", "step": 9},
    "diffusers.bin": {"<cat-toy>": vectors(1, 300)[0]},
    "list.bin": [{"a": vectors(1, 400), "other": torch.ones(1, 5)}, {"b": vectors(2, 410)}],
    "lora.safetensors": {
        "lora_unet_x.lora_down.weight": torch.ones(2, 2),
        "bundle_emb.one.clip_l": vectors(1, 500),
        "bundle_emb.two.clip_l": vectors(2, 510),
    },
    "parameter.pt": {"string_to_param": {"*": torch.nn.Parameter(vectors(1, 600))}},
    "seven.safetensors": {"clip_l": vectors(7, 700)},
    "nine.safetensors": {"clip_l": vectors(9, 800)},
    "folder/deep.safetensors": {"clip_l": vectors(1, 900)},
    "dotted.v2,.safetensors": {"clip_l": vectors(1, 950)},
}

PROMPTS = [
    "embedding:both",
    "a photo of embedding:both, in the rain",
    "embedding:onetrainer.safetensors  and   more words",
    "a (embedding:a1111:1.3) and (embedding:diffusers)",
    "embedding:list\nembedding:lora text<lora:x:1>",
    "embedding:parameter[a:b] embedding:a1111<x> end",
    "cat,embedding:both is text",
    "embedding:missing, and text",
    "embedding:missing",
    "embedding:folder/deep embedding:deep",
    "embedding:../outside and embedding:/etc/passwd",
    "embedding:dotted.v2, first",
    "embedding:both,, twice",
    "word " * 70 + "embedding:seven after",
    "word " * 70 + "embedding:nine after",
    "(embedding:both embedding:missing2:0.8) x",
]
ENCODED = (0, 1, 3, 13, 14)
"""Indices of prompts that are encoded as well."""


def written(folder: Path) -> Path:
    """The folder with all files in it, and one that names must not reach beside it."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    save_file({"clip_l": vectors(1, 999)}, folder.parent / "outside.safetensors")
    return folder


def named(tokens: Sequence[Any]) -> list[Any]:
    """Token ids, and vectors by the number that they begin with, which none shares."""
    return [token if isinstance(token, int) else round(float(token.flatten()[0]), 5) for token in tokens]
