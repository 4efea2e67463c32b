"""The way of steps: chosen by times that are kept, and the same in a resumed run. The clock is replaced."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.adapters import frozen_weights
from lorasmith.data.dataset import EncodedDataset
from lorasmith.training import autotune, planning
from lorasmith.training.autotune import Tuned, _ways_apart, tuned
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.events import Autotuned, Event, StepDone, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.memory import compilation
from lorasmith.training.memory.memory_plan import MemoryPlan
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable
from lorasmith.training.trial import TrialFailed
from lorasmith.training.way import Way
from tests.covering import slow_except

CPU = torch.device("cpu")
Run = Callable[..., TrainResult]


class Timer:
    """Stands for the times of ways, by a part of their names; `asked` are the ways that were measured."""

    def __init__(self, **seconds: float | None) -> None:
        self.seconds = seconds
        self.asked: list[str] = []

    def __call__(self, engine: Engine, way: Way, batches: object, clock: object) -> Mapping[str, float]:
        self.asked.append(str(way))
        kind = "compile" if way.compile else way.products if way.products != "training_dtype" else way.activations
        kind = "graphs" if way.cuda_graphs else kind
        found = self.seconds[kind if kind != "keep" or not way.checkpoint_depth else "depth"]
        if found is None:
            return {}
        return {"step": found, "compiling": 100.0} if way.compile else {"step": found}


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    """There is a compiler, which takes no minutes."""
    monkeypatch.setattr(autotune, "compiler", lambda device: "g++")
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Timer]:
    def replaced(**seconds: float | None) -> Timer:
        timer = Timer(**seconds)
        monkeypatch.setattr(autotune, "_times", timer)
        return timer

    return replaced


def engine_of(model: Trainable, **settings: Any) -> Engine:
    settings = {"autotune": True, **settings}
    job = plan_job(model, TrainConfig(targets="*.attn2.to_q", batch_size=2, **settings), CPU)
    return Engine(job.model, job.adapters, job.config, job.way)


def plan(activations: Any, depth: int = 0) -> MemoryPlan:
    return MemoryPlan(activations, depth, 1, 2)


def choose(
    engine: Engine, dataset: EncodedDataset, steps: int = 1000, plans: Sequence[MemoryPlan] = (), **others: Any
) -> Tuned:
    maker = batch_maker(engine.model, dataset, engine.config, engine.way, engine.rank_masks)
    others = {"apart": lambda: lambda way, limit_s: autotune._times(engine, way, [], time.perf_counter), **others}
    with engine.frozen():
        return tuned(engine, maker.step(0), plans, steps, **others)


def test_the_fastest_of_activations_products_and_code(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "has_products", lambda kind, device: kind == "int8")
    engine = engine_of(hand_made, quantization="int8")
    timer = timed(keep=3.0, lean=4.0, depth=2.0, int8=1.0, compile=0.8)
    found = choose(engine, dataset, plans=[plan("keep"), plan("lean"), plan("keep", 2)])
    assert found.way == replace(engine.way, checkpoint_depth=2, products="int8", compile=True)
    depth = "blocks recomputed at depth 2"
    both = f"{depth}, products in int8"
    assert timer.asked == ["keep", "lean", depth, both, f"{both}, compiled"]
    assert str(found) == (
        f"Steps: {both}, compiled; seconds a step: keep: 3; lean: 4; {depth}: 2; {both}: 1; {both}, compiled: 0.8. "
        "Leave autotune out to set it yourself."
    )


def test_long_runs_try_what_rounds_alike_by_default(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And say so first; short ones time one way alone."""
    monkeypatch.setattr(autotune, "has_products", lambda kind, device: kind == "int8")
    engine, heard = engine_of(hand_made, quantization="int8", autotune=None), list[Event]()
    timer = timed(keep=3.0, int8=0.1, compile=0.8)
    found = choose(engine, dataset, emit=heard.append)
    assert timer.asked == ["keep", "keep, compiled"]
    assert found.way == replace(engine.way, compile=True)
    assert str(found).endswith("Turn autotune off to set it yourself.")
    (said,) = heard
    assert isinstance(said, Warned) and said.is_remark
    assert said.message.startswith("The run's steps take about 0:50:00: other ways")
    assert "for at most 0:02:30; turn autotune off" in said.message
    engine.way = replace(engine.way, varying_sizes=True)
    assert not choose(engine, dataset, emit=heard.append).way.compile
    heard.clear()
    timer = timed(keep=0.5, compile=0.1)
    short = engine_of(hand_made, autotune=None)
    assert choose(short, dataset, steps=1000, emit=heard.append).way == short.way
    assert timer.asked == ["keep"] and not heard


def test_by_default_no_way_is_begun_after_a_twentieth_of_the_run(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer]
) -> None:
    engine, ticks = engine_of(hand_made, autotune=None), iter([0.0, 100.0, 151.0])
    timer = timed(keep=3.0, lean=2.95, depth=2.8, compile=0.8)
    found = choose(engine, dataset, plans=[plan("lean"), plan("keep", 2)], clock=lambda: next(ticks))
    assert timer.asked == ["keep", "lean"]
    assert found.way == engine.way


@pytest.mark.parametrize(
    ("seconds", "steps", "is_compiled"),
    [
        (0.8, 1000, True),
        (0.98, 1000, False),  # within the noise
        (0.8, 599, False),  # a run of less than ten minutes
        (0.9, 610, False),  # 61 s are saved, and compiling takes 100
        (None, 1000, False),  # it failed
    ],
)
def test_compiling_pays_in_long_runs(
    hand_made: Trainable,
    dataset: EncodedDataset,
    timed: Callable[..., Timer],
    seconds: float | None,
    steps: int,
    is_compiled: bool,
) -> None:
    timer = timed(keep=1.0, compile=seconds)
    assert choose(engine_of(hand_made), dataset, steps).way.compile is is_compiled
    assert timer.asked == ["keep"] + ["keep, compiled"] * (steps >= 600)


def on_a_card(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine as if its way were a GPU's."""
    monkeypatch.setattr(autotune, "_ways_apart", lambda _: iter([autotune._captured, autotune._compiled]))
    return engine


def test_graphs_and_compiled_blocks_are_two_ways(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = timed(keep=1.0, graphs=0.7, compile=0.65)
    engine = on_a_card(engine_of(hand_made), monkeypatch)
    assert choose(engine, dataset).way == replace(
        engine.way, cuda_graphs=True
    )  # 50 s are saved, and compiling takes 100
    assert timer.asked == ["keep", "keep, CUDA graphs", "keep, compiled"]
    assert choose(engine, dataset, steps=10_000).way == replace(engine.way, compile=True)
    engine.way = replace(engine.way, cuda_graphs=True)  # as somebody asked for
    assert list(_ways_apart(engine)) == []


def test_only_a_gpu_that_needs_no_host_is_captured(hand_made: Trainable) -> None:
    def captures(device: str, **settings: Any) -> bool:
        engine = engine_of(hand_made, **settings)
        engine.way = replace(engine.way, device=torch.device(device))
        return autotune._captured in list(_ways_apart(engine))

    assert captures("cuda") and not captures("cpu")
    assert not captures("cuda", offloading=True)
    assert autotune._captured(replace(engine_of(hand_made).way, activations="host")).cuda_graphs is False


def test_a_process_that_fails_ends_nothing_and_is_named(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would fail again is not tried again; what took too long is."""
    timed(keep=1.0)
    asked = list[str]()

    def trial(way: Way, limit_s: float) -> Mapping[str, float]:
        asked.append(f"{way}: {limit_s:g}")
        raise TrialFailed("it crashed" if way.cuda_graphs else "it took too long", is_final=way.cuda_graphs)

    engine, heard = on_a_card(engine_of(hand_made), monkeypatch), list[Event]()
    found = choose(engine, dataset, apart=lambda: trial, emit=heard.append)
    assert found.way == engine.way
    assert "not keep, CUDA graphs: it crashed; not keep, compiled: it took too long. Leave" in str(found)
    assert asked == ["keep, CUDA graphs: 900", "keep, compiled: 900"]
    [said] = [event.message for event in heard if isinstance(event, Warned)]
    assert said.startswith("Compiled blocks and CUDA graphs are timed in processes of their own, each for at most 0:15")
    choose(engine, dataset, apart=lambda: trial)
    assert asked[2:] == ["keep, compiled: 900"]


def test_by_default_a_process_has_what_is_left_of_the_time(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(keep=3.0)
    limits = list[float]()

    def trial(way: Way, limit_s: float) -> Mapping[str, float]:
        limits.append(limit_s)
        raise TrialFailed("it took too long", is_final=False)

    ticks = iter([0.0, 20.0, 100.0])
    engine = on_a_card(engine_of(hand_made, autotune=None), monkeypatch)
    choose(engine, dataset, apart=lambda: trial, clock=lambda: next(ticks))
    assert limits == [130.0]  # of 150; 50 are too few


def test_times_are_kept_by_machine_and_step(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer], kept: Path
) -> None:
    timed(keep=1.0, compile=0.5)
    engine = engine_of(hand_made)
    found = choose(engine, dataset)
    [(machine, times)] = json.loads(kept.read_text()).items()
    assert machine == "a card, cpu" and [one.rpartition("; ")[2] for one in times] == ["keep", "keep, compiled"]
    timer = timed(keep=1.0, compile=2.0)
    assert choose(engine, dataset) == found and not timer.asked
    assert not choose(engine_of(hand_made, rank=3), dataset).way.compile and len(timer.asked) == 2


@pytest.mark.parametrize("compile", slow_except([False, True], False))
def test_a_way_is_timed_by_steps_and_leaves_the_engine_as_it_was(
    hand_made: Trainable, dataset: EncodedDataset, compile: bool
) -> None:
    engine = engine_of(hand_made)
    before = engine.way
    ticks = iter(range(0, 10_000, 3))
    maker = batch_maker(engine.model, dataset, engine.config, engine.way, engine.rank_masks)
    with engine.frozen():
        [batches] = [maker.step(0)]
        way = replace(
            before,
            activations="keep" if compile else "lean",
            checkpoint_depth=0 if compile else 1,
            compile=compile,
        )
        expected = {"step": 1.0, "compiling": 3.0} if compile else {"step": 1.0}
        assert autotune._times(engine, way, batches, lambda: next(ticks)) == expected
    assert engine.way == before


def test_compiled_blocks_are_all_recomputed(
    hand_made: Trainable, dataset: EncodedDataset, timed: Callable[..., Timer]
) -> None:
    timer = timed(depth=2.0, compile=1.0)
    engine = engine_of(hand_made)
    engine.way = replace(engine.way, checkpoint_depth=1, kept_blocks=3)
    way = choose(engine, dataset).way
    assert way.compile and way.kept_blocks == 1
    assert timer.asked == [
        "blocks but the last 3 recomputed at depth 1",
        "blocks recomputed at depth 1, compiled",
    ]
    timer = timed(keep=3.0, compile=1.0)  # what is set is not varied
    assert choose(engine_of(hand_made, compile=True), dataset).way.compile
    assert timer.asked == ["keep, compiled"]


def test_a_way_that_fails_is_not_taken(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., Any]:
        def gradient(self: Engine, batches: object) -> None:
            raise error

        return gradient

    engine = engine_of(hand_made)
    with engine.frozen():
        monkeypatch.setattr(Engine, "gradient", fail(torch.OutOfMemoryError("CUDA out of memory")))
        assert autotune._times(engine, engine.way, [], lambda: 0.0) == {}
        monkeypatch.setattr(Engine, "gradient", fail(NotImplementedError("no such operation")))
        assert autotune._times(engine, replace(engine.way, compile=True), [], lambda: 0.0) == {}
        with pytest.raises(NotImplementedError):
            autotune._times(engine, engine.way, [], lambda: 0.0)


def test_where_nothing_is_chosen(hand_made: Trainable) -> None:
    assert engine_of(hand_made, autotune=True).way.autotune
    assert not engine_of(hand_made, autotune=None).way.autotune
    on_gpu: list[tuple[dict[str, Any], bool]] = [({}, True), ({"autotune": False}, False), ({"compile": True}, False)]
    for settings, is_tuned in on_gpu:
        job = plan_job(hand_made, TrainConfig(targets="*.attn2.to_q", **settings), CPU)
        assert Way.of(job.config, job.model.module, torch.device("cuda")).autotune == is_tuned, settings
    config = TrainConfig(targets="*.attn2.to_q", autotune=True, deterministic=True)
    job = plan_job(hand_made, config, CPU)
    assert not job.way.autotune
    assert "autotune has no effect, as deterministic is on." in job.notes


def test_a_resumed_run_keeps_its_way(
    quick_run: Run,
    dataset: EncodedDataset,
    timed: Callable[..., Timer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its products, for which the frozen weights are made again."""
    monkeypatch.setattr(autotune, "has_products", lambda kind, device: kind == "int8")
    enabled: list[str] = []
    original = frozen_weights.products_enabled

    def noted(module: Any, kind: Any, device: Any) -> Any:
        enabled.append(kind)
        return original(module, kind, device)

    monkeypatch.setattr("lorasmith.training.trainable.products_enabled", noted)
    settings: dict[str, Any] = {"steps": 3, "quantization": "int8"}
    plain = quick_run(dataset, products="int8", **settings)
    assert enabled == ["int8"]
    heard: list[Event] = []

    def some(until: int) -> TrainResult:
        return quick_run(
            dataset,
            **settings,
            autotune=True,
            output=tmp_path / "run",
            on_event=heard.append,
            cancelled=lambda: sum(isinstance(event, StepDone) for event in heard) >= until,
        )

    def said() -> Iterator[str]:
        return (event.message for event in heard if isinstance(event, Autotuned))

    timed(keep=1.0, int8=0.5)
    assert some(until=1).reason == "cancelled"
    assert list(said()) == [
        "Steps: keep, products in int8; seconds a step: keep: 1; keep, products in int8: 0.5. "
        "Leave autotune out to set it yourself."
    ]
    timer = timed(keep=1.0, int8=math.inf)
    assert some(until=9).losses == plain.losses
    assert not timer.asked and len(list(said())) == 1
    assert enabled == ["int8"] * 3


def test_the_model_is_not_frozen_while_another_process_has_it(
    run: Run, dataset: EncodedDataset, timed: Callable[..., Timer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is again behind it, in the way that was chosen."""
    timed(keep=1.0)
    heard, depths, depth = list[Event](), list[int](), 0
    frozen = Engine.frozen

    @contextlib.contextmanager
    def counted(self: Engine) -> Iterator[None]:
        nonlocal depth
        with frozen(self):
            depth += 1
            try:
                yield
            finally:
                depth -= 1

    def apart(engine: Engine, way: Way, batches: Any, limit_s: float, **_: Any) -> Mapping[str, float]:
        depths.append(depth)
        return {"step": 0.5}

    monkeypatch.setattr(Engine, "frozen", counted)
    monkeypatch.setattr(autotune, "_LONG", 0.0)
    monkeypatch.setattr(autotune, "_ways_apart", lambda _: iter([lambda way: replace(way, activations="lean")]))
    monkeypatch.setattr(planning, "timed_apart", apart)
    found = run(dataset, autotune=True, on_event=heard.append)
    assert depths == [0]
    assert [event.message for event in heard if isinstance(event, Autotuned)] == [
        "Steps: lean; seconds a step: keep: 1; lean: 0.5. Leave autotune out to set it yourself."
    ]
    assert found.losses == run(dataset, activations="lean").losses
