"""Frozen weights of a run or of encoders: quantized, offloaded to host memory, or both.

The weights of Linear layers and convolutions, nearly all of a denoiser, are kept packed (`core.quantization`), on the
device or in host memory (`weight_stream`). `FrozenLayer` unpacks each for the forward pass and again for the backward
pass, so that no weight is a saved tensor, with or without an adapter. Other parameters are left to
`core.placement.placed`, as are weights already packed in the model, unless `kind` differs or they are offloaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import PRODUCTS, FrozenLayer, layers_as_stored, packable_layers, weight_source_set
from lorasmith.adapters.weight_stream import WeightStream, are_offloaded, streamed_bytes
from lorasmith.core.blocks import blocks_at_depth, units
from lorasmith.core.choices import ProductFormat, Quantization
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.pinned_memory import DeviceCopies
from lorasmith.core.placement import free_memory, full_precision, memory_format_for, placed
from lorasmith.core.quantization import CodeFormat, Packed, WeightSource, packed, weight_source
from lorasmith.core.quantized_products import PRODUCT_KINDS


@contextlib.contextmanager
def weights_packed(
    module: nn.Module,
    *,
    kind: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    stream: WeightStream | None = None,
    share: float = 1.0,
    without: Iterable[nn.Module] = (),
) -> Iterator[list[nn.Parameter]]:
    """Inside the context, the frozen weights of `module` are packed; yields those parameters, which `placed` must skip.

    Packed weights stay on the device and are unpacked to `dtype`; with a `stream`, a share of the blocks is in host
    memory. Kind `none` leaves weights as they are in the model. The parameters keep shape, device and dtype but are an
    expanded single NaN, which reveals code that reads them without `FrozenLayer`. Afterwards the originals are restored
    bit for bit.
    """
    others = set(without)
    packable = packable_layers(module) if kind != "none" or stream is not None else []
    layers = [layer for layer in packable if layer not in others]
    layout = memory_format_for(module)
    sources: dict[nn.Module, WeightSource] = {}
    with contextlib.ExitStack() as undo:
        copies = undo.enter_context(contextlib.closing(DeviceCopies(device)))
        if stream is not None:
            undo.callback(stream.clear)
            blocks = _in_blocks(module, layers)
            for block, is_away in zip(blocks, are_offloaded(len(blocks), share), strict=True):
                weights = [packed_weight(layer, kind, copies, dtype, layout) for layer in block]
                sources.update(zip(block, stream.add(weights, kept_by=None if is_away else copies), strict=True))
        for layer in layers:
            if layer not in sources:
                sources[layer] = packed_weight(layer, kind, copies, dtype, layout).copied(copies, dtype, layout)
            undo.enter_context(weight_source_set(layer, sources[layer], device=device, dtype=dtype))
        copies.close()
        yield [layer.get_parameter("weight") for layer in layers]


@contextlib.contextmanager
def weights_streamed(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, a module is placed but for the weights of its layers, which are copied as they are used.

    They are in pinned memory, or where they were if that would take more than half of the free host memory. Results
    are those of the module placed as a whole.
    """
    needed = frozen_bytes(module, kind="none", dtype=dtype)
    stream = WeightStream(device, is_pinned=2 * needed <= free_memory(torch.device("cpu")))
    with (
        weights_packed(module, kind="none", device=device, dtype=dtype, stream=stream) as weights,
        placed(module, device=device, dtype=dtype, without=weights),
    ):
        yield


def packed_weight(
    layer: nn.Module, kind: Quantization, copies: DeviceCopies, dtype: torch.dtype, layout: torch.memory_format
) -> Packed:
    """The weight of a Linear or convolution packed as `kind`; with `none` it stays on its device, packed as it is.

    A weight packed in another way is unpacked first. `layout` is the memory format of convolution kernels.
    """
    source = weight_source(layer)
    if isinstance(source, Packed) and kind == "none":
        return source.to(source.tensors[0].device, dtype, layout)
    with FrozenLayer(layer).weight_acquired() as own:
        weight = own.detach()
        there = DeviceCopies(weight.device) if kind == "none" else copies  # quantize on the device, where it is fast
        laid = there.to(weight, weight.dtype, layout if weight.ndim == 4 else torch.preserve_format)
        one = packed(laid, kind, dtype)
        if kind != "none":
            release_pages(weight)
        return one


def frozen_bytes(module: nn.Module, *, kind: Quantization, dtype: torch.dtype, processes: int = 1) -> int:
    """Bytes of a model's frozen weights on each device during a run; its tensors may be on the meta device."""
    sizes, whole = _sizes(module, kind, dtype, as_in_file=processes > 1)
    if processes > 1:
        blocks = [sum(sizes.get(layer, 0) for layer in block.modules()) for block in blocks_at_depth(module, 1)]
        # A shard of all blocks, and three whole blocks: the one in use, the next one, and its gather buffer.
        return whole - sum(blocks) + -(-sum(blocks) // processes) + 3 * max(blocks, default=0)
    return whole


def offloaded_bytes(
    module: nn.Module, *, kind: Quantization, dtype: torch.dtype, share: float = 1.0
) -> tuple[int, int]:
    """Bytes of a model's frozen weights on the device and in host memory, where a share of its blocks is offloaded."""
    sizes, whole = _sizes(module, kind, dtype, as_in_file=True)
    blocks = [sum(sizes[layer] for layer in block) for block in _in_blocks(module, sizes)]
    away = are_offloaded(len(blocks), share)
    host = sum(size for size, is_away in zip(blocks, away, strict=True) if is_away)
    return whole - sum(blocks) + streamed_bytes(blocks, away), host


def _sizes(
    module: nn.Module, kind: Quantization, dtype: torch.dtype, *, as_in_file: bool
) -> tuple[dict[nn.Module, int], int]:
    """Bytes of the frozen weight of each layer, and of the whole module.

    `as_in_file` is whether weights in a narrower dtype than that of products are kept in theirs, however few.
    """
    sizes: dict[nn.Module, int] = {}
    as_stored = set(layers_as_stored(module, dtype))
    for layer in packable_layers(module):
        source, weight = weight_source(layer), layer.get_parameter("weight")
        if isinstance(source, Packed) and kind == "none":
            sizes[layer] = source.size_bytes
        elif kind == "none" and (layer in as_stored or as_in_file):
            sizes[layer] = weight.numel() * min(weight.itemsize, dtype.itemsize)
        else:
            sizes[layer] = _packed_bytes(weight.shape, kind, dtype)
    weights, full = {layer.get_parameter("weight") for layer in sizes}, full_precision(module)
    others = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor not in weights]
    rest = sum(
        other.numel()
        * ((torch.float32 if other in full else dtype) if other.is_floating_point() else other.dtype).itemsize
        for other in others
    )
    return sizes, rest + sum(sizes.values())


@contextlib.contextmanager
def products_enabled(module: nn.Module, kind: ProductFormat, device: torch.device) -> Iterator[None]:
    """Inside the context, layers for which `takes_products` holds multiply in a format, forward and backward."""
    formats = {layer: format_in_model(layer) for layer in packable_layers(module)}
    chosen = {
        layer: format_
        for layer, format_ in formats.items()
        if format_ is not None and takes_products(layer, kind, format_)
    }
    try:
        for layer, format_ in chosen.items():
            setattr(layer, PRODUCTS, PRODUCT_KINDS[kind].make(format_, layer.get_parameter("weight").shape, device))
        yield
    finally:
        for layer in chosen:
            layer.__dict__.pop(PRODUCTS, None)


def takes_products(layer: nn.Module, kind: ProductFormat, codes: CodeFormat | None) -> bool:
    """Whether a layer with such codes can multiply in a format: Linear layers of the sizes that it needs."""
    sizes = layer.get_parameter("weight").shape
    if codes is None or codes.products != kind or len(sizes) != 2:
        return False
    return not any(size % PRODUCT_KINDS[kind].multiple for size in sizes)


@functools.cache
def _packed_bytes(shape: torch.Size, kind: Quantization, dtype: torch.dtype) -> int:
    """Bytes of a packed weight of a shape, computed on the meta device."""
    return packed(torch.empty(shape, device="meta"), kind, dtype).size_bytes


def _in_blocks(module: nn.Module, layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Layers that are offloaded together: those of each block that repeats, or each layer where a network has none."""
    left = dict.fromkeys(layers, True)
    blocks = [[layer for layer in unit.modules() if left.pop(layer, False)] for unit in units(module)]
    return list(filter(None, blocks)) or [[layer] for layer in left]


def format_in_model(layer: nn.Module) -> CodeFormat | None:
    """Format of a layer's codes; None if it has none, or none that is multiplied."""
    source = weight_source(layer)
    return None if source is None else source.format
