"""Packed weights in host memory, copied to a device a block at a time.

The weights of a block lie side by side in one pinned buffer, so that one copy brings all of them. Two buffers of the
device receive the blocks in turn: while the device computes with one, the next block is copied into the other, on a
separate stream. The next block is predicted from the last two, as blocks run in the same order in every pass; a wrong
prediction costs one transfer. Weights never change, so they are copied one way.

A share of the blocks may stay on the device. These are spread evenly, so that every copy has as much computation as
possible to hide behind.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorasmith.core.byte_layout import ByteLayout, ByteRange
from lorasmith.core.mapped_files import release_pages
from lorasmith.core.pinned_memory import DeviceCopies, PinnedBuffer
from lorasmith.core.placement import side_stream
from lorasmith.core.quantization import AlwaysHere, CodeFormat, Packed, WeightSource, weight_source


class WeightStream:
    """The offloaded blocks of a network. On the CPU they are copied too, for tests.

    Without `is_pinned` weights stay where they are in host memory, such as on a mapped file; copies are then slower,
    and the host waits for them.

    Attributes:
        copies: number of blocks that were copied to be used.
    """

    def __init__(self, device: torch.device, *, is_pinned: bool = True) -> None:
        self.device = device
        self.copies = 0
        self._is_pinned = is_pinned and device.type == "cuda"
        self._side = side_stream(device, "weights") if device.type == "cuda" else None
        self._blocks: list[Block] = []
        self._buffers: list[_Buffer] = []
        self._current: Block | None = None
        self._before: Block | None = None  # the one used before
        self._following: dict[tuple[Block | None, Block], Block] = {}

    def add(self, weights: Sequence[Packed], *, kept_by: DeviceCopies | None = None) -> list[StreamedWeight]:
        """Add a block of packed weights, which is offloaded, or kept on the device by copies; returns their sources."""
        block = Block(self, weights)
        if kept_by is None:
            block.offload(is_pinned=self._is_pinned)
        else:
            block.keep(kept_by)
        self._blocks.append(block)
        return block.weights

    def keep(self, share: float) -> None:
        """Move blocks to the device for good, so that at most a share of all (0 to 1) stays offloaded."""
        self._free_buffers()
        with contextlib.closing(DeviceCopies(self.device)) as copies:
            for block, is_away in zip(self._blocks, are_offloaded(len(self._blocks), share), strict=True):
                if not is_away and not block.is_kept:
                    block.keep(copies)

    def sizes(self) -> list[int]:
        """Bytes of each block."""
        return [block.size_bytes for block in self._blocks]

    @property
    def size_bytes(self) -> int:
        """Bytes that the blocks take on the device now."""
        return streamed_bytes(self.sizes(), [not block.is_kept for block in self._blocks])

    def fetch(self, block: Block) -> None:
        """Have the weights of a block on the device, for what is queued until another one is fetched."""
        if block is self._current:
            return
        if self._current is not None:
            self._following[self._before, self._current] = block
        self._before, self._current = self._current, block
        here = torch.cuda.current_stream(self.device) if self._side is not None else None
        if not self._buffers:
            self._buffers = self._made(here)
        if here is not None and (left := self._holding(self._before)) is not None:
            left.free = here.record_event()
        buffer = self._holding(block) or self._send(block, spared=self._before)
        if here is not None and buffer.arrived is not None:
            here.wait_event(buffer.arrived)
        block.move(buffer.weights(block))
        coming = self._following.get((self._before, block))
        if coming is not None and self._holding(coming) is None:
            self._send(coming, spared=block)

    def clear(self) -> None:
        """Forget all blocks."""
        self._free_buffers()
        for block in self._blocks:
            block.forget_host()
            block.weights.clear()
        self._blocks.clear()

    def _free_buffers(self) -> None:
        if self._side is not None:  # whose copies come before the current stream may use the memory otherwise
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        for buffer in self._buffers:
            for block in buffer.known:
                block.move(block.on_host)
        self._buffers.clear()
        self._following.clear()
        self._before = self._current = None

    def _made(self, here: torch.cuda.Stream | None) -> list[_Buffer]:
        """As many buffers as blocks need, two at most; their memory may still be in use on the current stream."""
        sizes = [block.size_bytes for block in self._blocks if not block.is_kept]
        free = None if here is None else here.record_event()
        return [
            _Buffer(torch.empty(max(sizes), dtype=torch.uint8, device=self.device), free=free)
            for _ in range(min(2, len(sizes)))
        ]

    def _holding(self, block: Block | None) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.block is block), None)

    def _send(self, block: Block, *, spared: Block | None) -> _Buffer:
        """Copy a block to a buffer that has another one than `spared`."""
        buffer = next(buffer for buffer in self._buffers if buffer.block is None or buffer.block is not spared)
        buffer.block = block
        self.copies += 1
        if self._side is None:
            block.copy_to(buffer.bytes)
            return buffer
        if buffer.free is not None:
            self._side.wait_event(buffer.free)
        with torch.cuda.stream(self._side):
            block.copy_to(buffer.bytes)
            buffer.arrived = self._side.record_event()
        return buffer


@dataclass(eq=False)
class _Buffer:
    """Memory of the device for one block at a time."""

    bytes: Tensor
    block: Block | None = None
    arrived: torch.cuda.Event | None = None  # when the block was copied
    free: torch.cuda.Event | None = None  # when the block before it was used for the last time
    known: dict[Block, list[Packed]] = field(default_factory=dict)  # weights of the blocks that were here

    def weights(self, block: Block) -> list[Packed]:
        if block not in self.known:
            self.known[block] = block.weights_in(self.bytes)
        return self.known[block]


class Block:
    """Packed weights that are copied together: offloaded to host memory, or kept on the device."""

    def __init__(self, stream: WeightStream, weights: Sequence[Packed]) -> None:
        layout = ByteLayout()
        self.stream = stream
        self._places = [[layout.add(tensor) for tensor in weight.tensors] for weight in weights]
        self._copies = self._placed(weights)
        self._pinned: PinnedBuffer | None = None
        self.weights = [StreamedWeight(self, weight) for weight in weights]
        self.on_host: list[Packed] = []
        self.size_bytes = layout.size_bytes
        self.is_kept = False

    def offload(self, *, is_pinned: bool) -> None:
        """Move the weights to host memory."""
        self.on_host = [weight.here.to(torch.device("cpu"), weight.here.dtype) for weight in self.weights]
        self._copies = self._placed(self.on_host)
        if is_pinned:
            pinned = PinnedBuffer(self.size_bytes, self.stream.device)
            self.copy_to(pinned.bytes)
            self.forget_host()
            self._pinned, self._copies = pinned, [(pinned.bytes, ByteLayout().add(pinned.bytes))]
            self.on_host = self.weights_in(pinned.bytes)
        self.move(self.on_host)

    def keep(self, copies: DeviceCopies) -> None:
        """Move the weights to the device for good."""
        buffer = torch.empty(self.size_bytes, dtype=torch.uint8, device=self.stream.device)
        for tensor, place in self._copies:
            copies.copy(tensor, place.view(buffer))
        self.forget_host()
        self.move(self.weights_in(buffer))
        self.is_kept = True

    def fetch(self) -> None:
        """See `WeightStream.fetch`."""
        if not self.is_kept:
            self.stream.fetch(self)

    def copy_to(self, buffer: Tensor) -> None:
        for tensor, place in self._copies:
            place.view(buffer).copy_(tensor, non_blocking=True)

    def weights_in(self, buffer: Tensor) -> list[Packed]:
        """The weights in a buffer that `copy_to` writes."""
        return [
            replace(weight.here, tensors=tuple(place.view(buffer) for place in places))
            for weight, places in zip(self.weights, self._places, strict=True)
        ]

    def move(self, weights: Sequence[Packed]) -> None:
        """Let the layers use these."""
        for weight, here in zip(self.weights, weights, strict=True):
            weight.here = here

    def _placed(self, weights: Sequence[Packed]) -> list[tuple[Tensor, ByteRange]]:
        return [
            pair
            for weight, places in zip(weights, self._places, strict=True)
            for pair in zip(weight.tensors, places, strict=True)
        ]

    def forget_host(self) -> None:
        """Free the host memory, once the device has read it."""
        for tensor, _ in self._copies:
            release_pages(tensor)
        if self._pinned is not None:
            self._pinned.free()
        self._pinned, self._copies, self.on_host = None, [], []


class StreamedWeight(WeightSource):
    """A layer's weight source in a stream."""

    def __init__(self, block: Block, weight: Packed) -> None:
        self.block = block
        self.here = weight  # where it was last

    @property
    def format(self) -> CodeFormat | None:
        return self.here.format

    def use(self) -> contextlib.AbstractContextManager[Packed]:
        if not torch.compiler.is_compiling():  # a compiled block is fetched before it is called
            self.block.fetch()
        return AlwaysHere(self.here)


def streamed_block(module: nn.Module) -> Block | None:
    """The block that a module's weights are in; None if they are not streamed."""
    sources = (weight_source(layer) for layer in module.modules())
    return next((source.block for source in sources if isinstance(source, StreamedWeight)), None)


def streams_of(module: nn.Module) -> set[WeightStream]:
    """The streams of a network's weights."""
    sources = (weight_source(layer) for layer in module.modules())
    return {source.block.stream for source in sources if isinstance(source, StreamedWeight)}


def streamed_bytes(sizes: Sequence[int], away: Sequence[bool]) -> int:
    """Bytes on the device of blocks of these sizes, where those that are `away` share two buffers."""
    offloaded = [size for size, is_away in zip(sizes, away, strict=True) if is_away]
    return sum(sizes) - sum(offloaded) + min(2, len(offloaded)) * max(offloaded, default=0)


def are_offloaded(count: int, share: float) -> list[bool]:
    """Which of `count` blocks are offloaded, at equal distances: a share of them (0 to 1), rounded up."""
    away = math.ceil(share * count - 1e-6)
    return [(place + 1) * away // count > place * away // count for place in range(count)]


def share_within(streams: Collection[WeightStream], free_bytes: int) -> float:
    """The least share that can be offloaded of all streams if they take at most so much more of the device's memory."""
    most = sum(stream.size_bytes for stream in streams) + free_bytes
    all_sizes = [stream.sizes() for stream in streams]
    shares = sorted({away / len(sizes) for sizes in all_sizes for away in range(len(sizes))})
    taken = (
        (share, sum(streamed_bytes(sizes, are_offloaded(len(sizes), share)) for sizes in all_sizes)) for share in shares
    )
    return next((share for share, size in taken if size <= most), 1.0)
