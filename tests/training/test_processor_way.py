"""Format and threads of a run on a processor, given the times of steps and what other programs do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.data.dataset import EncodedDataset
from lorasmith.training import processor_way
from lorasmith.training import way as ways
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine
from lorasmith.training.events import Event, Resumed, StepDone
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.processor_way import ProcessorWay, on_processor
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable

Choose = Callable[..., tuple[TrainJob, int]]


class Timer:
    """Stands for the times of steps, by format and threads; `asked` are the ways that were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = dict[str, float | None]()
        self.asked: list[str] = []
        monkeypatch.setattr(processor_way, "_times", self)

    def __call__(self, engine: Engine, batches: object, least: float, clock: object) -> dict[str, float]:
        name = "fp32" if engine.way.dtype == torch.float32 else "bf16"
        self.asked.append(f"{name} {torch.get_num_threads()}")
        found = self.seconds[self.asked[-1]]
        return {} if found is None else {"step": found}


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, kept: Path) -> Timer:
    return Timer(monkeypatch)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, busy: list[float]) -> Iterator[None]:
    """It has four processors with units for bf16, and the environment sets no threads."""
    monkeypatch.setattr(ways, "multiplies", lambda dtype, device: True)
    monkeypatch.setattr(processor_way, "threads_are_set", lambda: False)
    monkeypatch.setattr(processor_way, "usable_processors", lambda: 4)
    monkeypatch.setattr(processor_way, "busy_processors", lambda: busy.pop(0) if len(busy) > 1 else busy[0])
    monkeypatch.setattr(processor_way, "_WORTH_STEPS", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def busy() -> list[float]:
    """Processors that other programs keep busy."""
    return [0.1]


@pytest.fixture
def choose(hand_made: Trainable, dataset: EncodedDataset) -> Choose:
    """The job as it is trained, and the threads of its steps."""

    def go(**settings: Any) -> tuple[TrainJob, int]:
        given = {"steps": 100, "targets": "*.attn2.to_q", "rank": 2} | settings
        with on_processor(plan_job(hand_made, TrainConfig(**given), "cpu"), dataset.samples) as job:
            return job, torch.get_num_threads()

    return go


@pytest.mark.parametrize(
    ("seconds", "way", "asked"),
    [
        ([1.0, 0.5, 0.6], "fp32 4", ["bf16 4", "fp32 4", "fp32 2"]),
        ([1.0, 3.0, 1.1], "bf16 4", ["bf16 4", "fp32 4", "bf16 2"]),
        ([1.0, 0.98, 0.99], "bf16 4", ["bf16 4", "fp32 4", "bf16 2"]),  # within the noise
        ([1.0, 0.9, 0.7, 0.6], "fp32 1", ["bf16 4", "fp32 4", "fp32 2", "fp32 1"]),
        ([1.0, None, 1.0], "bf16 4", ["bf16 4", "fp32 4", "bf16 2"]),  # too little memory
    ],
)
def test_the_fastest_format_and_threads(
    choose: Choose, timer: Timer, seconds: list[float | None], way: str, asked: list[str]
) -> None:
    timer.seconds = dict(zip(asked, seconds, strict=True))
    job, threads = choose()
    assert timer.asked == asked
    assert f"{job.config.training_dtype} {threads}" == way
    assert job.way.dtype == (torch.float32 if "fp32" in way else torch.bfloat16)
    assert torch.get_num_threads() == 4, "restored"


def test_times_are_kept_and_named(choose: Choose, timer: Timer, kept: Path) -> None:
    timer.seconds = {"bf16 4": 1.0, "fp32 4": 0.5, "fp32 2": 0.75}
    job, _ = choose()
    [note] = [one for one in job.notes if "Products" in one]
    assert note == (
        "Products in fp32 on 4 threads; seconds a step: bf16 on 4 threads: 1, fp32 on 4 threads: 0.5, fp32 on 2 "
        "threads: 0.75. Set training_dtype to choose one."
    )
    [times] = json.loads(kept.read_text()).values()
    assert [(name.rpartition("; ")[2], one["step"]) for name, one in times.items()] == [
        ("bf16 on 4 threads", 1.0),
        ("fp32 on 4 threads", 0.5),
        ("fp32 on 2 threads", 0.75),
    ]
    timer.asked.clear()
    assert choose()[0].notes == job.notes and not timer.asked
    choose(batch_size=2)
    assert timer.asked, "another step"


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"steps": 99}, "bf16"),
        ({"deterministic": True}, "bf16"),
        ({"activations": "auto"}, "bf16"),
        ({"memory_budget": 4.0}, "bf16"),
        ({"compile": True}, "bf16"),
    ],
)
def test_where_nothing_is_measured(choose: Choose, timer: Timer, settings: dict[str, Any], dtype: str) -> None:
    job, threads = choose(**settings)
    assert (job.config.training_dtype, threads, timer.asked) == (dtype, 4, [])


@pytest.mark.parametrize(
    ("looks", "threads"), [([3.0, 0.1], 4), ([3.0, 2.0, 0.2], 4), ([3.0, 3.0, 1.0, 0.0], 3), ([0.1, 3.0], 4)]
)
def test_a_moment_of_other_programs_does_not_halve_the_threads_of_a_run(
    choose: Choose, busy: list[float], looks: list[float], threads: int
) -> None:
    """The page, which is drawn when a run begins, is such a program."""
    busy[:] = looks
    assert choose(steps=99)[1] == threads


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_format_that_is_set_is_kept(choose: Choose, timer: Timer, dtype: str) -> None:
    timer.seconds = {"bf16 4": 1.0, "fp32 4": 1.0, "bf16 2": 0.5, "fp32 2": 0.5, "bf16 1": 0.6, "fp32 1": 0.6}
    job, threads = choose(training_dtype=dtype)
    assert (job.config.training_dtype, threads) == (dtype, 2)
    assert timer.asked == [f"{dtype} {count}" for count in (4, 2, 1)]


def test_weights_that_fill_memory_are_not_made_fp32(
    choose: Choose, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_way, "free_memory", lambda device: 100_000)
    assert choose()[0].config.training_dtype == "bf16" and not timer.asked


def test_fewer_threads_beside_busy_programs(choose: Choose, timer: Timer, busy: list[float]) -> None:
    """Whose times would not hold later."""
    busy[0] = 1.2
    job, threads = choose()
    assert (job.config.training_dtype, threads, timer.asked) == ("bf16", 3, [])
    assert (
        "Other programs keep 1.2 of 4 processors busy, so that steps take longer, on 3 threads; close them for full "
        "speed." in job.notes
    )
    assert choose(deterministic=True)[1] == 4, "the last bits depend on their number"


def test_threads_of_the_environment_stay(choose: Choose, busy: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_way, "threads_are_set", lambda: True)
    busy[0] = 4.0
    job, threads = choose(training_dtype="fp32")
    assert threads == 4 and not any("programs" in one for one in job.notes)


def test_a_step_is_timed_without_training(hand_made: Trainable, dataset: EncodedDataset, kept: Path) -> None:
    ticks = iter(range(0, 1000, 3))
    job = plan_job(hand_made, TrainConfig(targets="*.attn2.to_q", rank=2, steps=100), "cpu")
    before = {name: tensor.clone() for path, one in job.trained for name, tensor in one.state_dict(prefix=path).items()}
    stream = torch.get_rng_state()
    load = processor_way.Load(4, 0.0, is_set=True)
    way, seconds = processor_way.fastest_way(job, dataset.samples, ("bf16", "fp32"), load, clock=lambda: next(ticks))
    assert way == ProcessorWay("bf16", 4) and set(seconds.values()) == {3.0}
    after = {name: tensor for path, one in job.trained for name, tensor in one.state_dict(prefix=path).items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_format_and_threads(
    run: Callable[..., TrainResult],
    dataset: EncodedDataset,
    timer: Timer,
    busy: list[float],
    kept: Path,
    tmp_path: Path,
) -> None:
    """Whatever would be measured then, on a machine that is busy by now."""
    timer.seconds = {"bf16 4": 1.0, "fp32 4": 0.5, "fp32 2": 0.4, "fp32 1": 0.5}
    heard: list[Event] = []

    def some(until: int) -> TrainResult:
        steps = lambda: sum(isinstance(event, StepDone) for event in heard)  # noqa: E731
        settings = {"training_dtype": "auto", "steps": 100, "output": tmp_path / "run", "on_event": heard.append}
        return run(dataset, cancelled=lambda: steps() >= until, **settings)

    assert some(until=1).reason == "cancelled"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["training_dtype"] == "fp32" and record["environment"]["threads"] == 2
    kept.unlink()
    timer.seconds, busy[0] = {"bf16 4": 0.1, "fp32 4": 1.0, "bf16 2": 0.2}, 3.0
    timer.asked.clear()
    assert (some(until=2).steps, timer.asked) == (2, [])
    [resumed] = [event for event in heard if isinstance(event, Resumed)]
    assert resumed.message.endswith("continues from step 1, bit-identically.")
