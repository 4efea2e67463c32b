"""The order of copies and products on several streams: what is checked is found, and what copies is in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_weights import weights_packed
from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.core import pinned_memory, quantization
from lorasmith.core.kernels import Kernel
from lorasmith.core.placement import placed, sent
from lorasmith.core.quantization import packed
from lorasmith.training.batches import prefetched
from lorasmith.training.step_results import Mailbox
from tests.cuda.streams import Event, Stream, Streams
from tests.cuda.tracing import DEVICE, MODE, Devices, Watch, faked, unpacked_in_place


def used(streams: Streams, *reads: Tensor) -> Tensor:
    """A new tensor, made of others on the current stream."""
    new = torch.empty(1)
    streams.operation(reads, [new], lambda: "here")
    return new


def read_by_another(streams: Streams) -> tuple[Tensor, Stream]:
    """A tensor of the current stream that another one reads afterwards, and that stream."""
    buffer, side = used(streams), streams.made()
    side.wait_stream(streams.current)
    with streams.chosen(side):
        used(streams, buffer)
    return buffer, side


def test_an_event_orders_what_two_streams_do() -> None:
    streams = Streams()
    side = streams.made()
    with streams.chosen(side):
        copied = used(streams)
        arrived = side.record_event()
    streams.current.wait_event(arrived)
    streams.recorded(copied, streams.current)
    used(streams, copied)
    assert not streams.races


def test_a_read_that_does_not_wait_is_found() -> None:
    streams = Streams()
    side = streams.made()
    with streams.chosen(side):
        early = side.record_event()
        copied = used(streams)
    streams.current.wait_event(early)  # of before the copy
    used(streams, copied)
    assert streams.races == {"read before it is written: here": 1}


def test_a_write_over_what_another_stream_reads_is_found() -> None:
    streams = Streams()
    buffer, _ = read_by_another(streams)
    streams.operation([], [buffer], lambda: "here")
    assert streams.races == {"written while it is used: here": 1}


@pytest.mark.parametrize("how", ["recorded", "waited", "neither"])
def test_memory_that_is_freed_while_another_stream_reads_it_is_found(how: str) -> None:
    streams = Streams()
    buffer, side = read_by_another(streams)
    if how == "recorded":
        streams.recorded(buffer, side)
    elif how == "waited":
        streams.current.wait_stream(side)
    del buffer
    used(streams)
    assert bool(streams.races) == (how == "neither")


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Streams and fake tensors of a device; steps without a backward pass need no stub of it."""
    found = Streams()
    registered = mock.patch.object(pinned_memory, "_registered", lambda _: None)
    unpacking = mock.patch.object(quantization, "unpacking_on", lambda *_: Kernel("", unpacked_in_place))
    with found.in_place(), Devices(MODE), registered, unpacking, MODE, Watch(found) as watch:
        yield watch


@pytest.fixture
def streams() -> Iterator[Streams]:
    with watched() as watch:
        yield watch._streams
    assert not watch.waits


def offloaded_step(blocks: int = 6, share: float = 1.0) -> WeightStream:
    """Products with weights that are in host memory, three times forwards and backwards."""
    stream = WeightStream(DEVICE)
    for _ in range(blocks):
        stream.add([packed(torch.empty(4, 4), kind, torch.float32) for kind in ("none", "int8")])
    stream.keep(share)
    weights = [source for block in stream._blocks for source in block.weights]
    x = torch.empty(4, 4, device=DEVICE)
    for _ in range(3):
        for source in (*weights, *reversed(weights)):
            with source.use() as sent:
                x = x @ sent.weight()
    return stream


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_offloaded_weights_are_in_order_and_the_host_waits_for_nothing(streams: Streams, share: float) -> None:
    stream = offloaded_step(share=share)
    assert not streams.races
    assert streams.host_waits == 0
    assert stream.copies == {1.0: 2 + 3 * 8, 0.5: 2 + 3 * 2, 0.2: 2}[share]
    stream.clear()
    used(streams)
    assert not streams.races, "the memory of the buffers is free"


@pytest.mark.parametrize(
    ("call", "race"),
    [("_use_waits", "read before it is written"), ("_copy_waits", "written while it is used")],
)
def test_offloaded_weights_without_their_order_are_found(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, call: str, race: str
) -> None:
    original = Stream.wait_event

    def wait(stream: Stream, event: Event) -> None:
        if (stream.number == 0) != (call == "_use_waits"):
            original(stream, event)

    monkeypatch.setattr(Stream, "wait_event", wait)
    offloaded_step()
    assert any(found.startswith(race) for found in streams.races)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_small", [False, True])
def test_weights_are_placed_without_a_wait_for_every_tensor(
    monkeypatch: pytest.MonkeyPatch, *, is_small: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(pinned_memory, "_BUFFER_BYTES", 2**18)
    monkeypatch.setattr(pinned_memory, "_LEAST_BYTES", 2**30 if is_small else 0)
    with watched() as watch:
        streams = watch._streams
        streams.made()  # operations of a single stream are not counted
        layers = [nn.Conv2d(64, 64, 3, bias=False), *(nn.Linear(256, 256, bias=False) for _ in range(6))]
        module = nn.Sequential(*layers).requires_grad_(False)
        faked(module)
        with (
            weights_packed(module[4:], kind="int8", device=DEVICE, dtype=torch.bfloat16) as packed,
            placed(module, device=DEVICE, dtype=dtype, without=packed),
        ):
            used(streams, *module.parameters())
    assert not streams.races
    assert bool(watch.waits) == is_small
    assert streams.host_waits == (0 if is_small else 1 + 2), "for the third buffer and each one after it"


@pytest.mark.parametrize("waits", [True, False])
def test_results_are_read_when_their_copy_is_done(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    if not waits:
        monkeypatch.setattr(Event, "synchronize", lambda _: None)
    mailbox, copied = Mailbox(DEVICE), list[int]()
    streams.made()  # operations of a single stream are not counted
    for step in range(3):
        mailbox.begin()
        mailbox.post(step, torch.ones(2, device=DEVICE) * step)
        copied.append(streams.clock(streams.current)[0])
    # What the host knows to be done where it reads.
    monkeypatch.setattr(Tensor, "tolist", lambda _: [streams.host.get(0, 0)])
    assert mailbox.collect() == []
    assert streams.host_waits == 0
    found = [*mailbox.collect(before=2), *mailbox.collect(wait=True)]
    assert [step for step, *_ in found] == [0, 1, 2]
    assert all(known >= copy for (_, [known], _), copy in zip(found, copied, strict=True)) == waits


@pytest.mark.parametrize("has_own_stream", [False, True])
def test_batches_of_another_thread_are_there_before_they_are_used(streams: Streams, *, has_own_stream: bool) -> None:
    other = streams.made()

    class Maker:
        def step(self, step: int) -> list[Tensor]:
            chosen = streams.chosen(other) if has_own_stream else contextlib.nullcontext()
            with Devices(MODE), MODE, Watch(streams), chosen:  # modes are of a thread
                return [sent(torch.ones(4), DEVICE, torch.float32)]

    with contextlib.closing(prefetched(Maker(), range(3))) as coming:
        for _, [batch] in coming:
            used(streams, batch)
    assert bool(streams.races) == has_own_stream
