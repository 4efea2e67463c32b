"""Layers whose weight is packed: which ones can be, and how a layer is given a packed weight and gets its own back.

A packed layer computes through `FrozenLayer`, which makes the weight anew for each product; its parameter is a
`placeholder`. A model is so while a run lasts (`frozen_weights`), or from its file on (`families.files`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, FrozenProduct, is_targetable
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, WeightSource, placeholder, weight_source

__all__ = ["give_source", "packable_layers", "packed_layers", "with_source"]


def packable_layers(module: nn.Module) -> list[nn.Module]:
    """Layers whose weight nobody uses but their own forward: plain Linear layers and convolutions, in model order."""
    owners = Counter(id(p) for one in module.modules() for p in one.parameters(recurse=False))
    return [
        layer
        for layer in module.modules()
        if is_targetable(layer) and type(layer) in (nn.Linear, *CONVOLUTIONS) and owners[id(layer.weight)] == 1
    ]


def packed_layers(module: nn.Module) -> dict[str, Packed]:
    """The weights that are packed and where they are used, by module path; those that are streamed in are not."""
    sources = ((path, weight_source(layer)) for path, layer in module.named_modules())
    return {path: source for path, source in sources if isinstance(source, Packed)}


def give_source(layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype) -> None:
    """Let a layer make its weight from `source`, on `device` and in `dtype`; its parameter lets go of what it holds."""
    weight = layer.get_parameter("weight")
    weight.data = placeholder(weight.shape, device, dtype)
    setattr(layer, WEIGHT_SOURCE, source)
    # As a method, for torch.compile tells methods apart by their function and other objects one by one.
    layer.forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__


@contextlib.contextmanager
def with_source(layer: nn.Module, source: WeightSource, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """`give_source` for a while; afterwards the layer has weight, source and forward from before, bit for bit."""
    weight, data = layer.get_parameter("weight"), layer.get_parameter("weight").data
    before = {name: layer.__dict__[name] for name in (WEIGHT_SOURCE, "forward") if name in layer.__dict__}
    try:
        give_source(layer, source, device=device, dtype=dtype)
        yield
    finally:
        weight.data = data
        for name in (WEIGHT_SOURCE, "forward"):
            layer.__dict__.pop(name, None)
        layer.__dict__.update(before)
