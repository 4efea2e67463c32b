"""When the likeness of previews ends a run."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.processes import Processes
from lorasmith.training.config import TrainConfig
from lorasmith.training.early_stopping import LikenessHistory
from lorasmith.training.events import Event, LikenessMeasured
from lorasmith.training.watchers import LikenessWatch


def measured(step: int, likeness: float, adherence: float) -> LikenessMeasured:
    return LikenessMeasured(
        step=step, likeness=likeness, own=0.7, adherence=adherence, score=likeness * adherence, at=float(step)
    )


def history(*rows: tuple[float, float]) -> LikenessHistory:
    return LikenessHistory(measured(10 * place, *row) for place, row in enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("rows", "stops"),
    [
        ([], False),
        ([(0.5, 0.9)], False),
        ([(0.5, 0.9), (0.5, 0.5), (0.5, 0.5)], True),
        ([(0.5, 0.9), (0.5, 0.5), (0.5, 0.87)], False),  # within what says nothing
        ([(0.5, 0.9), (0.5, 0.5)], False),  # one preview is not two
        ([(0.5, 0.9), (0.6, 0.5), (0.7, 0.5)], False),  # still more alike
        ([(0.5, 0.9), (0.5, 0.5), (0.6, 0.9), (0.6, 0.5)], False),  # a new best
        ([(0.2, 0.9), (0.6, 0.8), (0.62, 0.6), (0.6, 0.5)], True),
    ],
)
def test_it_stops_where_likeness_rises_no_more_and_prompts_are_followed_less(
    rows: list[tuple[float, float]], stops: bool
) -> None:
    assert history(*rows).should_stop(2) is stops
    assert not history(*rows).should_stop(0)


def test_a_step_taken_again_replaces_what_came_after_it() -> None:
    found = history((0.5, 0.9), (0.6, 0.9), (0.7, 0.9))
    found.add(measured(20, 0.4, 0.9))
    assert ([one.step for one in found.measured], found.best_step) == ([10, 20], 10)
    assert found.is_at(20) and not found.is_at(10)
    assert "since step 10" in found.reason and "0.50 then, 0.40 now" in found.reason


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), patience=st.integers(1, 4))
def test_it_stops_no_sooner_than_its_patience_after_the_best(rows: list[tuple[float, float]], patience: int) -> None:
    found = history(*rows)
    scores = [likeness * adherence for likeness, adherence in rows]
    assert found.best_step == 10 * (1 + scores.index(max(scores)))
    if found.should_stop(patience):
        assert len(rows) - 1 - scores.index(max(scores)) >= patience


class OtherRank(Processes):
    """A process that draws nothing and receives what rank 0 has measured."""

    def __init__(self) -> None:
        self.sent: LikenessMeasured | None = None

    def broadcast_from_rank0(self, make: Callable[[], Any]) -> Any:
        return self.sent


class FakeLoop:
    """A loop of ten steps whose weights are the number of the step."""

    def __init__(self) -> None:
        self.step, self.steps, self.is_stopped = 0, 10, False
        self.waited_s = [0.0]
        self.emitted: list[Event] = []
        self.emit = self.emitted.append
        self.engine = types.SimpleNamespace(evaluation_weights=self._weights)

    @contextmanager
    def _weights(self) -> Iterator[torch.Tensor]:
        yield torch.tensor([float(self.step)])

    def stop(self) -> None:
        self.is_stopped = True


def test_a_process_that_draws_nothing_stops_with_the_one_that_does_and_keeps_the_same_weights() -> None:
    rank, loop = OtherRank(), FakeLoop()
    watch = LikenessWatch(None, TrainConfig(steps=10, early_stop="likeness"), rank)
    for step, row in enumerate([(0.5, 0.9), (0.6, 0.9), (0.6, 0.5), (0.6, 0.4)], start=1):
        assert not loop.is_stopped
        loop.step, rank.sent = step, measured(step, *row)
        assert watch.due(loop) and watch.missed(loop)  # type: ignore[arg-type]
        watch(loop)  # type: ignore[arg-type]
        assert not watch.missed(loop)  # type: ignore[arg-type]
    assert loop.is_stopped and watch.best_step == 2
    assert watch.best is not None and watch.best.tolist() == [2.0]
    again = LikenessWatch(None, TrainConfig(steps=10, early_stop="likeness"), rank)
    again.load(*watch.state())
    assert again.history.measured == watch.history.measured and again.best_step == 2
    rank, loop = OtherRank(), FakeLoop()
    watch = LikenessWatch(None, TrainConfig(steps=10, early_stop="likeness"), rank)
    loop.step = 1
    watch(loop)  # type: ignore[arg-type]
    assert watch.best_step is None and watch.best is None and not loop.is_stopped
