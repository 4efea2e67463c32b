"""Frozen weights of a run or of encoders: quantized, offloaded to host memory, or both.

The weights of Linear layers and convolutions, nearly all of a denoiser, are kept packed (`core.quantization`), on the
device or in host memory (`WeightStream`). `FrozenLayer` unpacks each for the forward pass and again for the backward
pass, so that no weight is a saved tensor, with or without an adapter. Other parameters are left to
`core.placement.placed`, as are weights already packed in the model, unless `kind` differs or they are offloaded.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import PRODUCTS, FrozenLayer, layers_as_stored, packable_layers, weight_source_set
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.choices import ProductFormat, Quantization
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.pinned_memory import PinnedMemory
from lorasmith.core.placement import free_memory, full_precision, memory_format_for, placed
from lorasmith.core.quantization import (
    CodeFormat,
    Packed,
    WeightSource,
    packed,
    weight_source,
)
from lorasmith.core.quantized_products import PRODUCT_KINDS


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


@contextlib.contextmanager
def weights_streamed(module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, a module is placed but for the weights of its layers, which are copied as they are used.

    They are in pinned memory, or where they were if that would take more than half of the free host memory. Results
    are those of the module placed as a whole.
    """
    needed = frozen_bytes(module, kind="none", dtype=dtype, offloading=False)
    stream = WeightStream(device, is_pinned=2 * needed <= free_memory(torch.device("cpu")))
    with (
        weights_packed(module, kind="none", device=device, dtype=dtype, stream=stream) as weights,
        placed(module, device=device, dtype=dtype, without=weights),
    ):
        yield


def packed_weight(
    layer: nn.Module, kind: Quantization, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Packed:
    """The weight of a Linear or convolution packed as `kind`; with `none` it stays on its device, packed as it is.

    A weight packed in another way is unpacked first. `layout` is the memory format of convolution kernels.
    """
    source = weight_source(layer)
    if isinstance(source, Packed) and kind == "none":
        return source.to(source.tensors[0].device, dtype, layout)
    with FrozenLayer(layer).weight_acquired() as own:
        weight = own.detach()
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
    others = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor not in weights]
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
def products_enabled(module: nn.Module, kind: ProductFormat, device: torch.device) -> Iterator[None]:
    """Inside the context, layers for which `takes_products` holds multiply in a format, forward and backward."""
    formats = {layer: format_in_model(layer) for layer in packable_layers(module)}
    chosen = {layer: one for layer, one in formats.items() if one is not None and takes_products(layer, kind, one)}
    try:
        for layer, one in chosen.items():
            setattr(layer, PRODUCTS, PRODUCT_KINDS[kind].make(one, layer.get_parameter("weight").shape, device))
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


def _largest_block(module: nn.Module, sizes: Mapping[nn.Module, int]) -> int:
    return max(_block_bytes(module, sizes), default=0)


def _block_bytes(module: nn.Module, sizes: Mapping[nn.Module, int]) -> list[int]:
    return [sum(sizes.get(layer, 0) for layer in block.modules()) for block in blocks_at_depth(module, 1)]


def format_in_model(layer: nn.Module) -> CodeFormat | None:
    """Format of a layer's codes; None if it has none, or none that is multiplied."""
    source = weight_source(layer)
    return None if source is None else source.format


class _Sent(NamedTuple):
    """Tensors being copied to the device; `arrived` is None if the copy is done."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None


class Resident:
    """Bytes of live tensors: `now`, and at the `peak`."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def count(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


class WeightStream:
    """Packed weights in host memory, pinned for a GPU, and copied to the device when they are used.

    They never change, so they are copied one way and freed after use. The next weight is predicted from the last two,
    as layers run in the same order in every pass. One block of the model is prefetched on a separate stream while the
    device computes. A wrong prediction costs one transfer. On the CPU they are copied too, for tests.

    Without `is_pinned` they stay where they are in host memory, such as on a mapped file; copies are slower then, and
    the host waits for them.
    """

    def __init__(self, device: torch.device, *, is_pinned: bool = True) -> None:
        self.ahead_bytes = 0  # size of the prefetched weights
        self.resident = Resident()  # weights on the device: at most `ahead_bytes` and the weight in use
        self._device = device
        self._weights: list[Packed] = []
        self._coming: dict[int, _Sent] = {}
        self._following: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self._on_gpu = device.type == "cuda"
        self._is_pinned = is_pinned and self._on_gpu
        self._side = torch.cuda.Stream(device) if self._on_gpu else None
        self._pinned = PinnedMemory(device)
        self._in_flight: deque[tuple[torch.cuda.Event, int]] = deque()

    def add(self, weight: Packed) -> int:
        """Add a packed weight; returns its number."""
        tensors = tuple(tensor.cpu() for tensor in weight.tensors)
        if self._is_pinned:
            tensors = self._pinned.copies(tensors)
        self._weights.append(replace(weight, tensors=tensors))
        return len(self._weights) - 1

    def on_host(self, number: int) -> Packed:
        return self._weights[number]

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[Packed]:
        """A packed weight on the device inside the context, freed with the last reference to it."""
        yield self._fetched(number)
        self._settle(number)

    def _fetched(self, number: int) -> Packed:
        before = self._last
        self._following[before] = number
        self._last = (before[1], number)
        sent = self._coming.pop(number, None)
        coming = self._foreseen()
        self._coming = {one: waiting for one, waiting in self._coming.items() if one in coming}
        sent = sent or self._send(number)
        for one in coming:
            if one not in self._coming:
                self._coming[one] = self._send(one)
        if sent.arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(sent.arrived)
            for tensor in sent.tensors:
                tensor.record_stream(here)
        return replace(self._weights[number], tensors=sent.tensors)

    def clear(self) -> None:
        self._weights.clear()
        self._coming.clear()
        self._in_flight.clear()
        self._following.clear()
        self._last = (-1, -1)
        self._pinned.free()

    def _foreseen(self) -> list[int]:
        found: list[int] = []
        last, free = self._last, self.ahead_bytes
        while (one := self._following.get(last)) is not None and one not in found:
            free -= self._weights[one].size_bytes
            if free < 0:
                break
            found.append(one)
            last = (last[1], one)
        return found

    def _send(self, number: int) -> _Sent:
        if self._side is None:
            tensors = tuple(tensor.clone() for tensor in self._weights[number].tensors)
            arrived = None
        else:
            with torch.cuda.stream(self._side):
                tensors = tuple(tensor.to(self._device, non_blocking=True) for tensor in self._weights[number].tensors)
                arrived = self._side.record_event()
        for tensor in tensors:
            self.resident.count(tensor)
        return _Sent(tensors, arrived)

    def _settle(self, number: int) -> None:
        """Keep the host from running ahead of a GPU, as a used weight is freed only when its product is done."""
        if not self._on_gpu:
            return
        size = self._weights[number].size_bytes
        self._in_flight.append((torch.cuda.current_stream(self._device).record_event(), size))
        while sum(size for _, size in self._in_flight) > self.ahead_bytes and len(self._in_flight) > 1:
            self._in_flight.popleft()[0].synchronize()


@dataclass(frozen=True)
class StreamedWeight(WeightSource):
    """A layer's weight source in a stream."""

    stream: WeightStream
    number: int

    @property
    def format(self) -> CodeFormat | None:
        return self.stream.on_host(self.number).format

    def use(self) -> contextlib.AbstractContextManager[Packed]:
        return self.stream.use(self.number)
