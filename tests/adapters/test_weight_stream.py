"""Streaming: which weights are sent ahead, and how many are on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorasmith.adapters.frozen_weights import WeightStream
from lorasmith.core.quantization import packed

SIZE = 16 * 4


def stream_of(count: int, *, ahead: int) -> WeightStream:
    stream = WeightStream(torch.device("cpu"))
    for number in range(count):
        assert stream.add(packed(torch.full((4, 4), float(number)), "none", torch.float32)) == number
    stream.ahead_bytes = ahead * SIZE
    return stream


def sent(stream: WeightStream) -> list[int]:
    return sorted(stream._coming)


def fetched(stream: WeightStream, numbers: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Each weight in turn, with those that are sent ahead while it is in use."""
    for number in numbers:
        with stream.use(number) as weight:
            assert (weight.weight() == number).all()
            ahead = sent(stream)
        del weight
        yield number, ahead


def test_what_follows_is_learnt_in_one_step_and_sent_ahead_forwards_and_backwards() -> None:
    stream = stream_of(5, ahead=2)
    step = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert all(not ahead for _, ahead in fetched(stream, step))
    list(fetched(stream, step))
    third = dict(enumerate(ahead for _, ahead in fetched(stream, step)))
    assert third[1] == [2, 3]  # forwards
    assert third[6] == [1, 2]  # backwards
    assert third[8] == [0]  # the next step begins with what this one ends with


def test_nothing_but_what_is_ahead_and_in_use_is_on_the_device() -> None:
    stream = stream_of(8, ahead=3)
    order = [*range(8), *reversed(range(8))]
    for _ in range(3):
        list(fetched(stream, order))
        assert stream.resident.now <= 3 * SIZE
    assert stream.resident.peak == 4 * SIZE


def test_a_wrong_guess_is_dropped() -> None:
    stream = stream_of(6, ahead=2)
    for _ in range(2):
        list(fetched(stream, [0, 1, 2, 3]))
    list(fetched(stream, [0, 1]))
    assert sent(stream) == [2, 3]
    list(fetched(stream, [5]))
    assert sent(stream) == []
    assert stream.resident.now == 0


def test_a_weight_that_is_used_lives_as_long_as_its_user() -> None:
    stream = stream_of(2, ahead=0)
    with stream.use(0) as packed:
        weight = packed.weight()
    del packed
    assert stream.resident.now == SIZE
    del weight
    assert stream.resident.now == 0
