"""A run over several processes is the run of one: the same samples and noise, losses and weights to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.runs.run import run
from lorasmith.training import engine as engines
from lorasmith.training.engine import Engine
from lorasmith.training.events import Event, Shrunk, StepDone, Validated
from lorasmith.training.mailbox import Mailbox
from lorasmith.training.outcome import Outcome
from lorasmith.training.results import TrainResult
from lorasmith.training.train import Plan
from tests.covering import slow_except
from tests.hosts import NoFiles
from tests.training import together_cases
from tests.training.threads_together import ThreadTogether, run_together
from tests.training.together_cases import CASES, SETTINGS, planned, weights


@pytest.fixture(scope="module")
def copies(tiny: Model) -> list[Model]:
    """A model for each process."""
    return [tiny, *(load_model(BUILT_IN) for _ in range(3))]


Place = dict[str, Any]


def trained(
    copies: list[Model], data: EncodedDataset, processes: int = 1, *, place: Place | None = None, **settings: Any
) -> tuple[TrainResult, list[Event]]:
    """The result in the first process, and its events."""
    events: list[Event] = []

    def one(together: ThreadTogether) -> TrainResult:
        model = copies[together.rank]
        job = planned(model, settings, together if processes > 1 else None)
        host = NoFiles(also=events.append) if together.is_first else NoFiles()
        return run(Plan(denoiser=model.denoiser, job=job, data=data, **(place or {})), host)

    results = run_together(processes, one)
    assert all(one.losses == results[0].losses for one in results)
    tensors = [weights(one) for one in results]
    assert all(torch.equal(one[name], tensor) for one in tensors for name, tensor in tensors[0].items())
    return results[0], events


def assert_alike(one: TrainResult, other: TrainResult, tolerance: float = 1e-5) -> None:
    together_cases.assert_alike(one.losses, weights(one), other.losses, weights(other), tolerance)


NAMES = ("plain", "uneven shares", "accumulated", "dropout", "average", "held out", "LoKr", "DoRA", "half precision")
"""Cases that threads train too; `test_real_processes` has all of them."""


@pytest.mark.parametrize("name", slow_except(NAMES, "accumulated"))
@pytest.mark.parametrize("processes", slow_except([2, 3], 2))
def test_losses_and_weights_are_those_of_one_process(
    copies: list[Model], dataset: EncodedDataset, mixed: EncodedDataset, name: str, processes: int
) -> None:
    case = CASES[name]
    data = mixed if case.mixed else dataset
    alone, before = trained(copies, data, **case.settings)
    together, events = trained(copies, data, processes, **case.settings)
    assert_alike(together, alone, case.tolerance)

    def draws(told: list[Event]) -> list[list[tuple[int, float]]]:
        steps = [event for event in told if isinstance(event, StepDone)]
        return [sorted((index, round(quantile, 6)) for index, quantile, _ in one.draws) for one in steps]

    assert draws(events) == draws(before)
    losses = [[event.loss for event in told if isinstance(event, Validated)] for told in (events, before)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_bytes_of_a_step_are_those_of_the_parameters(copies: list[Model], dataset: EncodedDataset) -> None:
    def one(together: ThreadTogether) -> tuple[int, int]:
        job = planned(copies[together.rank], {"steps": 2}, together)
        numbers = Engine(job.denoiser, job.adapters, job.config, job.runtime).flat.master.numel()
        run(Plan(denoiser=copies[together.rank].denoiser, job=job, data=dataset), NoFiles())
        return together.bytes_summed, numbers

    summed, numbers = run_together(2, one)[0]
    assert summed == 2 * 4 * (numbers + SETTINGS["batch_size"] + 1)


def test_what_memory_is_too_small_for_in_one_process_is_repeated_in_all(
    copies: list[Model], dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = trained(copies, dataset)
    whole, failed = Engine.gradient, []

    def gradient(self: Engine, batches: Any) -> Any:
        if self.runtime.processes.rank == 1 and self.runtime.micro_batch == 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batches)

    monkeypatch.setattr(Engine, "gradient", gradient)
    together, events = trained(copies, dataset, 2)
    assert_alike(together, alone)
    (shrunk,) = (event for event in events if isinstance(event, Shrunk))
    assert (shrunk.step, shrunk.micro_batch) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at once", "numbers late on one host"])
def test_all_processes_skip_a_step_that_diverged_in_one(
    copies: list[Model], dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    whole, broken = engines.sample_losses, []
    boxes, collect = [], Mailbox.collect

    def collected(box: Mailbox, *, wait: bool = False, before: int | None = None) -> Any:
        """As on GPUs, where the numbers of a step may not have arrived yet."""
        boxes.extend([] if any(box is one for one in boxes) else [box])
        is_late = late and box is boxes[0] and not wait and before is None
        return [] if is_late else collect(box, wait=wait, before=before)

    monkeypatch.setattr(Mailbox, "collect", collected)

    def losses(denoiser: Any, batch: Any, config: Any, runtime: Any) -> Tensor:
        found = whole(denoiser, batch, config, runtime)
        if runtime.processes.rank == 1 and not broken:
            broken.append(True)
            return found * float("nan")
        return found

    monkeypatch.setattr(engines, "sample_losses", losses)
    result, _ = trained(copies, dataset, 2, steps=3)
    assert [loss == loss for loss in result.losses] == [False, True, True]


def test_a_process_that_is_stopped_stops_all(copies: list[Model], dataset: EncodedDataset, tmp_path: Path) -> None:
    def one(together: ThreadTogether) -> TrainResult:
        class Stopping(NoFiles):
            steps = iter((False, together.rank == 1))

            def cancelled(self) -> bool:
                return next(self.steps, together.rank == 1)

        model = copies[together.rank]
        job = planned(model, {"steps": 5}, together)
        return run(Plan(denoiser=model.denoiser, job=job, data=dataset, output=tmp_path / "run"), Stopping())

    first, second = run_together(2, one)
    assert first.reason is second.reason is Outcome.CANCELLED
    assert len(first.losses) == len(second.losses) == 2
    assert first.path is not None and second.path is None
    alone, _ = trained(copies, dataset, steps=5)
    resumed, _ = trained(copies, dataset, place={"output": tmp_path / "run"}, steps=5)
    assert_alike(resumed, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(copies: list[Model], dataset: EncodedDataset, tmp_path: Path) -> None:
    alone, _ = trained(copies, dataset, steps=4)
    trained(copies, dataset, 3, place={"output": tmp_path / "run", "until": 2}, steps=4)
    resumed, _ = trained(copies, dataset, 2, place={"output": tmp_path / "run"}, steps=4)
    assert_alike(resumed, alone)


def test_fewer_samples_than_processes_are_refused(copies: list[Model], dataset: EncodedDataset) -> None:
    with pytest.raises(OptionError, match=r"at least the number of processes, 3, got 2; raise grad_accumulation_ste"):
        trained(copies, dataset, 3, batch_size=2)


@pytest.mark.slow
def test_processes_with_other_images_are_refused(copies: list[Model], dataset: EncodedDataset) -> None:
    fewer = EncodedDataset(dataset.samples[:-1])

    def one(together: ThreadTogether) -> TrainResult:
        model = copies[together.rank]
        data = fewer if together.rank else dataset
        return run(Plan(denoiser=model.denoiser, job=planned(model, {}, together), data=data), NoFiles())

    with pytest.raises(TrainingError, match=r"process 1 differs from the first in the images or captions"):
        run_together(2, one)
