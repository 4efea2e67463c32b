"""Frozen weights during training: quantized, offloaded to host memory, or both.

The weights of Linear layers and convolutions, nearly all of a denoiser, are kept packed (`core.quantization`), on the
device or in host memory (`weight_stream`). `FrozenLayer` unpacks each for the forward pass and again for the backward
pass, so that no weight is a saved tensor, with or without an adapter. Other parameters are left to
`core.placement.placed`, as are weights already packed in the model, unless `kind` differs or they are offloaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import PRODUCTS, FrozenLayer, layers_as_stored, packable_layers, weight_source_set
from lorasmith.core.choices import Quantization
from lorasmith.core.fp8_products import CODES, MULTIPLE, Fp8Products
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.placement import full_precision, memory_format_for
from lorasmith.core.quantization import Packed, WeightSource, packed, weight_source
from lorasmith.training.memory.activation_checkpointing import blocks_at_depth
from lorasmith.training.memory.weight_stream import StreamedWeight, WeightStream


@contextlib.contextmanager
def weights_packed(
    module: nn.Module,
    *,
    kind: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    stream: WeightStream | None = None,
    without: Iterable[nn.Module] = (),
) -> Iterator[list[nn.Parameter]]:
    """Inside the context, the frozen weights of `module` are packed; yields those parameters, which `placed` must skip.

    Packed weights stay on the device, or in host memory with a `stream`, and are unpacked to `dtype`. Kind `none`
    leaves weights as they are in the model. The parameters keep shape, device and dtype but are an expanded single NaN,
    which reveals code that reads them without `FrozenLayer`. Afterwards the originals are restored bit for bit.
    """
    others = set(without)
    packable = packable_layers(module) if kind != "none" or stream is not None else []
    layers = [layer for layer in packable if layer not in others]
    layout = memory_format_for(module)
    sizes: dict[nn.Module, int] = {}
    with contextlib.ExitStack() as undo:
        if stream is not None:
            undo.callback(stream.clear)
        for layer in layers:
            one = packed_weight(layer, kind, device, dtype, layout)
            source: WeightSource = one if stream is None else StreamedWeight(stream, stream.add(one))
            sizes[layer] = one.size_bytes
            undo.enter_context(weight_source_set(layer, source, device=device, dtype=dtype))
        if stream is not None:
            stream.ahead_bytes = _largest_block(module, sizes)
        yield [layer.get_parameter("weight") for layer in layers]


def packed_weight(
    layer: nn.Module, kind: Quantization, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Packed:
    """The weight of a Linear or convolution packed as `kind`; with `none` it stays on its device, packed as it is.

    A weight packed in another way is unpacked first. `layout` is the memory format of convolution kernels.
    """
    source = weight_source(layer)
    if isinstance(source, Packed) and kind == "none":
        return source.to(source.tensors[0].device, dtype, layout)
    weight = FrozenLayer(layer).weight.detach()
    there = weight.device if kind == "none" else device  # quantize on the device, where it is fast
    laid = weight.to(there, memory_format=layout if weight.ndim == 4 else torch.preserve_format)
    one = packed(laid, kind, dtype)
    if kind != "none" or laid is not weight:
        release_pages(weight)
    return one


def frozen_bytes(
    module: nn.Module, *, kind: Quantization, dtype: torch.dtype, offloading: bool, processes: int = 1
) -> int:
    """Bytes of a model's frozen weights on each device during a run; its tensors may be on the meta device."""
    sizes: dict[nn.Module, int] = {}
    as_stored = set(layers_as_stored(module, dtype))
    for layer in packable_layers(module):
        source, weight = weight_source(layer), layer.get_parameter("weight")
        if isinstance(source, Packed) and kind == "none":
            sizes[layer] = source.size_bytes
        elif kind == "none" and (layer in as_stored or offloading or processes > 1):
            sizes[layer] = weight.numel() * min(weight.itemsize, dtype.itemsize)
        else:
            sizes[layer] = _packed_bytes(weight.shape, kind, dtype)
    weights, full = {layer.get_parameter("weight") for layer in sizes}, full_precision(module)
    others = [one for one in (*module.parameters(), *module.buffers()) if one not in weights]
    rest = sum(
        one.numel() * ((torch.float32 if one in full else dtype) if one.is_floating_point() else one.dtype).itemsize
        for one in others
    )
    if offloading:
        return rest + _largest_block(module, sizes) + max(sizes.values(), default=0)
    if processes > 1:
        blocks = _block_bytes(module, sizes)
        # A shard of all blocks, and three whole blocks: the one in use, the next one, and its gather buffer.
        return rest + sum(sizes.values()) - sum(blocks) + -(-sum(blocks) // processes) + 3 * max(blocks, default=0)
    return rest + sum(sizes.values())


@contextlib.contextmanager
def fp8_products_enabled(module: nn.Module) -> Iterator[None]:
    """Inside the context, layers for which `takes_fp8_products` holds multiply in fp8, forward and backward."""
    chosen = [layer for layer in packable_layers(module) if takes_fp8_products(layer, _code(layer))]
    try:
        for layer in chosen:
            setattr(layer, PRODUCTS, Fp8Products())
        yield
    finally:
        for layer in chosen:
            layer.__dict__.pop(PRODUCTS, None)


def takes_fp8_products(layer: nn.Module, code: torch.dtype | None) -> bool:
    """Whether a layer with codes of this format can multiply in fp8: Linear layers with sizes divisible by 16."""
    sizes = layer.get_parameter("weight").shape
    return code in CODES and len(sizes) == 2 and not any(size % MULTIPLE for size in sizes)


@functools.cache
def _packed_bytes(shape: torch.Size, kind: Quantization, dtype: torch.dtype) -> int:
    """Bytes of a packed weight of a shape, computed on the meta device."""
    return packed(torch.empty(shape, device="meta"), kind, dtype).size_bytes


def _largest_block(module: nn.Module, sizes: Mapping[nn.Module, int]) -> int:
    return max(_block_bytes(module, sizes), default=0)


def _block_bytes(module: nn.Module, sizes: Mapping[nn.Module, int]) -> list[int]:
    return [sum(sizes.get(one, 0) for one in block.modules()) for block in blocks_at_depth(module, 1)]


def _code(layer: nn.Module) -> torch.dtype | None:
    source = weight_source(layer)
    return None if source is None else source.code
