"""Frozen weights while a run lasts: quantized, or streamed in from host memory, or both.

The weights of Linear layers and convolutions are nearly all of a denoiser. Each is kept packed (`core.quantization`),
on the device or in host memory (`weight_stream`), and made anew where `FrozenLayer` asks for it: for the forward
pass and again for the backward pass, which finds no weight among its saved tensors. Layers with an adapter and layers
without one go the same way. Everything else (norms, biases, embeddings) is left to `core.placement.held`, and so are
weights that are packed in the model already, unless they are to be packed otherwise or streamed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import PRODUCTS, FrozenLayer
from lorasmith.adapters.packed_layers import packable_layers, with_source
from lorasmith.core.choices import Quantization
from lorasmith.core.fp8_products import CODES, MULTIPLE, Fp8Products
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.placement import memory_format_for
from lorasmith.core.quantization import Packed, WeightSource, packed, weight_source
from lorasmith.training.memory.activation_checkpointing import blocks_at_depth
from lorasmith.training.memory.weight_stream import StreamedWeight, WeightStream

__all__ = ["kept", "multiplied_in_fp8", "takes_fp8_products"]


@contextlib.contextmanager
def kept(
    module: nn.Module,
    *,
    kind: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    stream: WeightStream | None = None,
) -> Iterator[list[nn.Parameter]]:
    """Keep the frozen weights of `module` packed while inside, and put the originals back, bit for bit, afterwards.

    Meanwhile the parameters themselves hold nothing: they have shape, device and dtype of the weight but are a single
    NaN, which shows wherever something reads them past `FrozenLayer`.

    Args:
        module: the frozen model.
        kind: `none` keeps the numbers as they are, and what is packed in the model as that is.
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
            one = _packed(layer, kind, device, dtype, layout)
            source: WeightSource = one if stream is None else StreamedWeight(stream, stream.add(one))
            sizes[layer] = one.size_bytes
            undo.enter_context(with_source(layer, source, device=device, dtype=dtype))
        if stream is not None:
            blocks = [block.modules() for block in blocks_at_depth(module, 1)]
            stream.ahead_bytes = max((sum(sizes.get(one, 0) for one in block) for block in blocks), default=0)
        yield [layer.get_parameter("weight") for layer in layers]


@contextlib.contextmanager
def multiplied_in_fp8(module: nn.Module) -> Iterator[None]:
    """Let the layers that can (`takes_fp8_products`) multiply in fp8 while inside, forwards and backwards."""
    chosen = [layer for layer in packable_layers(module) if takes_fp8_products(layer, _code(layer))]
    try:
        for layer in chosen:
            setattr(layer, PRODUCTS, Fp8Products())
        yield
    finally:
        for layer in chosen:
            layer.__dict__.pop(PRODUCTS, None)


def takes_fp8_products(layer: nn.Module, code: torch.dtype | None) -> bool:
    """Whether products in fp8 exist for a layer with codes of this format: Linear ones whose sizes divide by 16."""
    sizes = layer.get_parameter("weight").shape
    return code in CODES and len(sizes) == 2 and not any(size % MULTIPLE for size in sizes)


def _packed(
    layer: nn.Module, kind: Quantization, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Packed:
    """A layer's weight as `kind` keeps it; a weight that is packed is unpacked first, unless it may stay as it is."""
    source = weight_source(layer)
    if isinstance(source, Packed) and kind == "none":
        return source.to(source.tensors[0].device, dtype, layout)
    weight = FrozenLayer(layer).weight.detach()
    there = weight.device if kind == "none" else device  # where quantizing is fast
    laid = weight.to(there, memory_format=layout if weight.ndim == 4 else torch.preserve_format)
    one = packed(laid, kind, dtype)
    if kind != "none" or laid is not weight:
        release_pages(weight)
    return one


def _code(layer: nn.Module) -> torch.dtype | None:
    source = weight_source(layer)
    return None if source is None else source.code
