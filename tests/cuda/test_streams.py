"""The order of copies and products on several streams: what is checked is found, and the weight stream is in order."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from lorasmith.adapters.frozen_weights import WeightStream
from lorasmith.core.pinned_memory import PinnedMemory
from lorasmith.core.quantization import packed
from tests.cuda.streams import Stream, Streams
from tests.cuda.tracing import DEVICE, MODE, Devices, Watch


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


@pytest.fixture
def streams() -> Iterator[Streams]:
    """Streams and fake tensors of a device; steps without a backward pass need no stub of it."""
    found = Streams()
    copies = mock.patch.object(PinnedMemory, "copies", lambda _, tensors: tuple(one.pin_memory() for one in tensors))
    with found.in_place(), Devices(MODE), copies, MODE, Watch(found) as watch:
        yield found
    assert not watch.waits


def offloaded_step(layers: int = 6) -> None:
    """Products with weights that are in host memory, three times forwards and backwards."""
    stream = WeightStream(DEVICE)
    for _ in range(layers):
        stream.add(packed(torch.empty(4, 4), "none", torch.float32))
    stream.ahead_bytes = 2 * 4 * 4 * 4
    x = torch.empty(4, 4, device=DEVICE)
    for _ in range(3):
        for number in (*range(layers), *reversed(range(layers))):
            with stream.use(number) as sent:
                x = x @ sent.weight()


def test_offloaded_weights_are_in_order_and_the_host_does_not_run_ahead(streams: Streams) -> None:
    offloaded_step()
    assert not streams.races
    assert streams.host_waits > 0


@pytest.mark.parametrize(
    ("owner", "name", "race"),
    [(Stream, "wait_event", "read before it is written"), (Streams, "recorded", "freed while it is used")],
)
def test_offloaded_weights_without_their_order_are_found(streams: Streams, owner: type, name: str, race: str) -> None:
    with mock.patch.object(owner, name, lambda *_: None):
        offloaded_step()
    assert any(found.startswith(race) for found in streams.races)
