"""Streaming: which blocks are copied ahead, which stay on the device, and what that takes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch

from lorasmith.adapters.weight_stream import Block, WeightStream, share_within
from lorasmith.core.quantization import packed

CPU = torch.device("cpu")
SIZE = 128  # bytes of a block of two weights


def stream_of(count: int) -> tuple[WeightStream, list[Block]]:
    stream, blocks = WeightStream(CPU), []
    for number in range(count):
        weights = [packed(torch.full((4, 4), float(value)), "none", torch.float32) for value in (number, -number)]
        blocks.append(stream.add(weights)[0].block)
    return stream, blocks


def used(stream: WeightStream, blocks: Sequence[Block], order: Sequence[int]) -> Iterator[tuple[int, set[int]]]:
    """Each block in turn, with those that are in a buffer while it is in use."""
    for number in order:
        for sign, source in zip((1, -1), blocks[number].weights, strict=True):
            with source.use() as weight:
                assert (weight.weight() == sign * number).all()
        yield number, {index for index, block in enumerate(blocks) if stream._holding(block) is not None}


def test_what_follows_is_learnt_in_one_step_and_copied_ahead_forwards_and_backwards() -> None:
    stream, blocks = stream_of(5)
    step = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    for _ in range(2):
        list(used(stream, blocks, step))
    before = stream.copies
    third = [found for _, found in used(stream, blocks, step)]
    assert third == [{0, 1}, {1, 2}, {2, 3}, {3, 4}, {3, 4}, {3, 4}, {2, 3}, {1, 2}, {0, 1}, {0, 1}]
    assert stream.copies - before == 6, "a step begins and turns with blocks that are there"


def test_a_wrong_prediction_costs_one_copy() -> None:
    stream, blocks = stream_of(6)
    for _ in range(2):
        list(used(stream, blocks, [0, 1, 2, 3]))
    list(used(stream, blocks, [0, 1]))
    before = stream.copies
    assert list(used(stream, blocks, [5])) == [(5, {1, 5})]
    assert stream.copies == before + 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_share_stays_on_the_device_and_is_never_copied_again(share: float) -> None:
    stream, blocks = stream_of(10)
    assert stream.size_bytes == 2 * SIZE
    stream.keep(share)
    away = {number for number, block in enumerate(blocks) if not block.is_kept}
    assert len(away) == 10 * share
    assert stream.size_bytes == (10 - len(away) + min(2, len(away))) * SIZE
    assert all(b - a <= 1 / share + 1 for a, b in zip(sorted(away), sorted(away)[1:], strict=False)), "evenly spread"
    for _ in range(2):
        for _, held in used(stream, blocks, [*range(10), *reversed(range(10))]):
            assert held <= away
    if share <= 0.2:
        assert stream.copies == len(away)


@pytest.mark.parametrize(("free", "share"), [(-1, 1.0), (0, 1.0), (SIZE, 0.75), (2 * SIZE - 1, 0.75), (2 * SIZE, 0.0)])
def test_as_many_blocks_stay_as_fit(free: int, share: float) -> None:
    """Of four blocks; two buffers take as much as two of them."""
    stream, _ = stream_of(4)
    assert share_within([stream], free) == share


def test_nothing_is_left_behind() -> None:
    stream, blocks = stream_of(4)
    list(used(stream, blocks, range(4)))
    stream.keep(0.5)  # between two passes
    list(used(stream, blocks, [0, 1, 2, 3, 2, 1, 0]))
    gc.collect()
    gc.disable()
    try:
        left = [weakref.ref(block.weights[0].here.tensors[0].untyped_storage()) for block in blocks]
        stream.clear()
        blocks.clear()
        assert not [one() for one in left if one() is not None]
    finally:
        gc.enable()
    assert stream.size_bytes == 0
