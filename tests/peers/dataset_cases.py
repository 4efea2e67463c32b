"""Small inputs on which ComfyUI's nodes for data sets were recorded (`record_comfyui_datasets.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A node, how its pictures are made, and its other inputs."""

    node: str
    pictures: str
    inputs: dict[str, Any]


def picture(width: int, height: int, phase: float = 0.0) -> Tensor:
    """A smooth picture (1, height, width, 3) of whole 255ths, the same on every machine."""
    x, y = torch.arange(width) / width, torch.arange(height)[:, None] / height
    channels = [(0.5 + 0.5 * torch.sin(6.0 * (x * (k + 1) + y) + phase)) * (1 - 0.2 * k) for k in range(3)]
    return ((torch.stack([one.expand(height, width) for one in channels], dim=-1) * 255).round() / 255)[None]


def numbered(count: int) -> list[Tensor]:
    """Grey pictures whose value is their number in 255ths."""
    return [torch.full((1, 4, 5, 3), number / 255) for number in range(count)]


def alike() -> list[Tensor]:
    """Pictures of which some look the same: the third as the first, the last almost as the second."""
    first, second = picture(24, 16), picture(16, 24, 2.0)
    nearly = second.clone()
    nearly[:, :10, :4] = 1.0
    return [first, second, picture(12, 8), picture(20, 20, 4.0), nearly]


def samples() -> list[Tensor]:
    """Latents of two sizes in batches of several."""
    counted = torch.arange(4 * 6 * 4, dtype=torch.float32).reshape(-1, 4, 2, 1)
    wide = torch.arange(4 * 3 * 8, dtype=torch.float32).reshape(-1, 4, 2, 2)
    return [counted[:5], counted[5:7], wide[:3], wide[3:5], counted[7:]]


WIDE, TALL, SQUARE = picture(23, 14), picture(14, 23, 1.0), picture(16, 16, 2.0)
PICTURES: dict[str, Any] = {
    "wide": WIDE,
    "tall": TALL,
    "square": SQUARE,
    "batch": torch.cat((WIDE, picture(23, 14, 3.0))),
    "alike": alike(),
    "grid": [WIDE, TALL, SQUARE, picture(40, 30, 1.0), picture(30, 40, 2.0)],
}

IMAGE_CASES: dict[str, Case] = {
    **{
        f"{node}-{edge}-{name}": Case(node, name, {key: edge})
        for node, key in (("ResizeImagesByShorterEdge", "shorter_edge"), ("ResizeImagesByLongerEdge", "longer_edge"))
        for edge in (9, 31)
        for name in ("wide", "tall", "square", "batch")
    },
    **{
        f"CenterCropImages-{width}x{height}-{name}": Case("CenterCropImages", name, {"width": width, "height": height})
        for width, height in ((9, 8), (15, 64), (64, 64))
        for name in ("wide", "tall", "batch")
    },
    **{
        f"RandomCropImages-{seed}-{name}": Case("RandomCropImages", name, {"width": 9, "height": height, "seed": seed})
        for seed in (0, 7, 2**32 - 1, 2**64 - 1)
        for name, height in (("wide", 8), ("tall", 64), ("batch", 8))
    },
    "NormalizeImages": Case("NormalizeImages", "wide", {"mean": 0.4, "std": 0.3}),
    "NormalizeImages-batch": Case("NormalizeImages", "batch", {"mean": 0.5, "std": 0.001}),
    **{
        f"{node}-{factor}": Case(node, "batch", {"factor": factor})
        for node in ("AdjustBrightness", "AdjustContrast")
        for factor in (0.0, 0.6, 1.7)
    },
    **{
        f"ImageDeduplication-{threshold}": Case("ImageDeduplication", "alike", {"similarity_threshold": threshold})
        for threshold in (0.0, 0.5, 0.75, 0.95, 1.0)
    },
    "ImageGrid": Case("ImageGrid", "grid", {"columns": 3, "cell_width": 40, "cell_height": 32, "padding": 5}),
    "ImageGrid-row": Case("ImageGrid", "grid", {"columns": 20, "cell_width": 32, "cell_height": 32, "padding": 0}),
    "MergeImageLists": Case("MergeImageLists", "alike", {}),
}

ORDER_CASES = [(count, seed) for count in (1, 7, 40) for seed in (0, 3, 2**32 - 1, 2**64 - 1)]
"""Number of pictures and seed of ShuffleDataset and ShuffleImageTextDataset."""

_WORDS = " A Fox,\tin ÉTÉ \n ß fox "
TEXT_CASES: list[tuple[str, dict[str, Any]]] = [
    ("TextToLowercase", {"texts": _WORDS}),
    ("TextToUppercase", {"texts": _WORDS}),
    ("TruncateText", {"texts": _WORDS, "max_length": 5}),
    ("TruncateText", {"texts": _WORDS, "max_length": 10000}),
    ("AddTextPrefix", {"texts": _WORDS, "prefix": "sks, "}),
    ("AddTextSuffix", {"texts": _WORDS, "suffix": ", photo"}),
    ("ReplaceText", {"texts": _WORDS, "find": "fox", "replace": "dog"}),
    ("ReplaceText", {"texts": _WORDS, "find": "", "replace": "-"}),
    ("StripWhitespace", {"texts": _WORDS}),
    ("StripWhitespace", {"texts": "  \n"}),
]

FRAMES = 23
"""Of the video in `FRAME_CASES`."""
FRAME_CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("VideoFrameSample", {"num_frames": count, "strategy": strategy, "seed": seed})
        for strategy in ("uniform", "head", "tail", "random")
        for count in (1, 2, 7, 22, 99)
        for seed in ((0, 5, 2**32 - 1, 2**64 - 1) if strategy == "random" else (0,))
    ),
    *(
        ("VideoTemporalCrop", {"start_frame": start, "length": length})
        for start in (0, 9, 22, 99)
        for length in (1, 8, 99)
    ),
    *(
        ("VideoRandomTemporalCrop", {"length": length, "seed": seed})
        for length in (1, 8, 22, 99)
        for seed in (0, 5, 2**32 - 1, 2**64 - 1)
    ),
]

REBATCH = (1, 2, 3, 4, 100)
"""Batch sizes of RebatchLatents on `samples`."""
