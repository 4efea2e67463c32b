"""Frozen weights while a run lasts: quantized, or streamed in from host memory, or both.

The weights of Linear layers and convolutions are nearly all of a denoiser. Each is kept packed (`core.quantization`),
on the device or in host memory (`training.streaming`), and made anew where `FrozenLayer` asks for it: for the forward
pass and again for the backward pass, which finds no weight among its saved tensors. Layers with an adapter and layers
without one go the same way. Everything else (norms, biases, embeddings) is left to `core.placement.held`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from lorasmith.adapters.base import CONVOLUTIONS, WEIGHT_SOURCE, FrozenLayer, FrozenProduct, is_targetable
from lorasmith.adapters.inject import restore_forward
from lorasmith.core.placement import memory_format_for
from lorasmith.core.quantization import packed
from lorasmith.training.checkpointing import blocks_at_depth
from lorasmith.training.streaming import WeightStream

__all__ = ["kept", "packable_layers"]


def packable_layers(module: nn.Module) -> list[nn.Module]:
    """Layers whose weight nobody uses but their own forward: plain Linear layers and convolutions, in model order."""
    owners = Counter(id(p) for one in module.modules() for p in one.parameters(recurse=False))
    return [
        layer
        for layer in module.modules()
        if is_targetable(layer) and type(layer) in (nn.Linear, *CONVOLUTIONS) and owners[id(layer.weight)] == 1
    ]


@contextlib.contextmanager
def kept(
    module: nn.Module,
    *,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    stream: WeightStream | None = None,
) -> Iterator[list[nn.Parameter]]:
    """Keep the frozen weights of `module` packed while inside, and put the originals back, bit for bit, afterwards.

    Meanwhile the parameters themselves hold nothing: they have shape, device and dtype of the weight but are a single
    NaN, which shows wherever something reads them past `FrozenLayer`.

    Args:
        module: the frozen model.
        kind: of `PACKINGS`; `none` keeps the numbers as they are.
        device: where products are computed.
        dtype: what weights are unpacked to.
        stream: where packed weights wait in host memory, one block of the model ahead; None keeps them on the device.

    Yields:
        the parameters that are looked after, for `held` to leave alone; none if there is nothing to do.
    """
    layers = packable_layers(module) if kind != "none" or stream is not None else []
    layout = memory_format_for(module)
    sizes: dict[nn.Module, int] = {}
    with contextlib.ExitStack() as undo:
        if stream is not None:
            undo.callback(stream.clear)
        for layer in layers:
            weight = layer.get_parameter("weight")
            wanted = layout if weight.ndim == 4 else torch.preserve_format
            there = weight.device if kind == "none" else device  # where quantizing is fast
            one = packed(weight.data.to(there, memory_format=wanted), kind, dtype)
            source = one.weight if stream is None else functools.partial(stream.fetch, stream.add(one))
            sizes[layer] = one.size_bytes
            undo.callback(setattr, weight, "data", weight.data)
            weight.data = torch.full((), torch.nan, device=device, dtype=dtype).expand(weight.shape)
            undo.callback(delattr, layer, WEIGHT_SOURCE)
            setattr(layer, WEIGHT_SOURCE, source)
            undo.callback(restore_forward, layer, layer.__dict__.get("forward"))
            layer.forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__
        if stream is not None:
            blocks = [block.modules() for block in blocks_at_depth(module, 1)]
            stream.ahead_bytes = max((sum(sizes.get(one, 0) for one in block) for block in blocks), default=0)
        yield [layer.get_parameter("weight") for layer in layers]
