"""A run over several processes is the run of one: the same samples and noise, losses and weights to rounding.

All processes of a world are forked once, meet over gloo, and train all cases, one after the other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.processes import Processes
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding_cache import FOLDER_VARIABLE
from lorasmith.families.model import Model
from lorasmith.runs.run import run
from lorasmith.training import engine as engines
from lorasmith.training.engine import Engine
from lorasmith.training.events import Outcome, Shrunk, StepDone, Validated
from lorasmith.training.step_results import Mailbox
from lorasmith.training.train import Plan
from lorasmith.training.trainable import Trainable
from tests.hosts import NoFiles
from tests.training.processes_together import processes_together
from tests.training.together_cases import CASES, SETTINGS, Case, Materials, assert_alike, planned, weights

TWICE = ("accumulated", "dropout", "AdamW", "DoRA", "held out", "wildcards", "Flux.1")
"""Cases that are trained again by as many processes."""

Place = dict[str, Any]
"""Fields of a plan: its folder and such."""
Found = dict[str, Any]
"""What a process has of a run."""
World = Mapping[str, Sequence[Found]]
"""What each process has of a case."""


def trained(
    model: Model | Trainable,
    data: EncodedDataset,
    place: Place | None = None,
    host: NoFiles | None = None,
    **settings: Any,
) -> Found:
    host = host or NoFiles()
    job = planned(model, settings)
    denoiser = model.denoiser if isinstance(model, Model) else None
    result = run(Plan(denoiser=denoiser, job=job, data=data, **(place or {})), host)
    events = host.events
    steps = [one for one in events if isinstance(one, StepDone)]
    return {
        "losses": result.losses,
        "tensors": weights(result),
        "reason": result.reason,
        "validations": [(one.step, one.loss, one.best) for one in events if isinstance(one, Validated)],
        "draws": [sorted((index, round(quantile, 6)) for index, quantile, _ in one.draws) for one in steps],
        "shrunk": [(one.step, one.micro_batch) for one in events if isinstance(one, Shrunk)],
        "encoded": 0 if data.captions is None else data.captions.encoded,
        "path": result.path,
        "files": [] if result.folder is None else sorted(_names(result.folder)),
    }


def _names(folder: Path) -> Iterator[str]:
    """The files in a folder, as paths in it."""
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def together(size: int, *arguments: Any, **settings: Any) -> Found:
    """What the first of several processes has of a run; the others have the same."""
    first, *others = processes_together(size, lambda _: trained(*arguments, **settings))
    for other in others:
        assert_same(other, first)
    return first


def assert_same(one: Found, other: Found) -> None:
    assert one["losses"] == other["losses"] and one["validations"] == other["validations"]
    assert all(torch.equal(one["tensors"][name], tensor) for name, tensor in other["tensors"].items())


def assert_equal(one: Found, other: Found, tolerance: float = 1e-5) -> None:
    """Two runs are the same to rounding."""
    assert_alike(one["losses"], one["tensors"], other["losses"], other["tensors"], tolerance)
    assert one["draws"] == other["draws"] and one["reason"] == other["reason"]
    judged = [[(step, best) for step, _, best in each["validations"]] for each in (one, other)]
    assert judged[0] == judged[1]
    losses = [[loss for _, loss, _ in each["validations"]] for each in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=max(tolerance, 1e-4))
    assert one["files"] == other["files"]


def world(size: int, materials: Materials, out: Path, names: Sequence[str] = tuple(CASES)) -> World:
    def case(name: str) -> Found:
        given: Case = CASES[name]
        place = {"output": out / name / "run", "title": "cat"} if given.has_folder else None
        try:
            return trained(materials.model(given.model), materials.samples(given), place, **materials.settings(given))
        except Exception as error:
            error.add_note(name)
            raise

    def one(_: Processes) -> dict[str, Found]:
        warnings.simplefilter("ignore")
        os.environ[FOLDER_VARIABLE] = str(out / "cache")
        return {name: case(name) for name in names}

    found = processes_together(size, one)
    return {name: [each[name] for each in found] for name in names}


def test_losses_weights_and_draws_are_those_of_one_process(hand_made: Trainable, mixed: EncodedDataset) -> None:
    """One of the cases below, in the default run."""
    settings = {**CASES["accumulated"].settings, "targets": "*attn*"}
    assert_equal(together(2, hand_made, mixed, **settings), trained(hand_made, mixed, **settings))


@pytest.fixture(scope="module")
def materials(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials.made(tmp_path_factory.mktemp("materials"), tiny)


@pytest.fixture(scope="module")
def worlds(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    """By the number of processes."""
    folder = tmp_path_factory.mktemp("worlds")
    return {size: world(size, materials, folder / str(size)) for size in (1, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(worlds: dict[int, World], size: int, name: str) -> None:
    (alone,) = worlds[1][name]
    first, *others = worlds[size][name]
    for other in others:
        assert_same(other, first)
        assert other["path"] is None and not other["files"]
    assert_equal(first, alone, CASES[name].tolerance)
    assert sum(one["encoded"] for one in worlds[size][name]) == alone["encoded"]


@pytest.mark.slow
def test_cases_reach_what_they_are_about(worlds: dict[int, World]) -> None:
    (stopped,), (previews,), (kept,) = (worlds[1][name] for name in ("stopped early", "previews", "kept on the way"))
    assert stopped["reason"] == "stopped" and len(stopped["losses"]) < 6
    assert "cat-best.safetensors" in stopped["files"] or not stopped["validations"][-1][2]
    assert sum(one.startswith("samples/") for one in previews["files"]) > 4
    assert "cat-step00000002.safetensors" in kept["files"]
    assert worlds[1]["wildcards"][0]["encoded"] > 6, "more captions than pictures"


@pytest.mark.slow
def test_a_number_of_processes_gives_the_same_bits_again(
    worlds: dict[int, World], materials: Materials, tmp_path: Path
) -> None:
    again = world(2, materials, tmp_path / "again", TWICE)
    for name in TWICE:
        assert_same(again[name][0], worlds[2][name][0])


@pytest.mark.slow
def test_bytes_of_a_step_are_those_of_the_parameters(tiny: Model, dataset: EncodedDataset) -> None:
    def one(processes: Processes) -> tuple[int, int]:
        job, summing, summed = planned(tiny, {"steps": 2}), processes.summing, []

        def counted(tensor: Tensor) -> Callable[[], object]:
            summed.append(tensor.nbytes if tensor.is_floating_point() else 0)  # counts are a few numbers
            return summing(tensor)

        processes.summing = counted  # type: ignore[method-assign]
        run(Plan(denoiser=tiny.denoiser, job=job, data=dataset), NoFiles())
        return sum(summed), Engine(job.model, job.adapters, job.config, job.way).flat.master.numel()

    summed, numbers = processes_together(2, one)[0]
    assert summed == 2 * 4 * (numbers + SETTINGS["batch_size"] + 1)


@pytest.mark.slow
def test_what_memory_is_too_small_for_in_one_process_is_repeated_in_all(
    tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(tiny, dataset)
    whole, failed = Engine.gradient, []

    def gradient(self: Engine, batches: Any) -> Any:
        if self.way.processes.rank == 1 and self.way.micro_batch == 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batches)

    monkeypatch.setattr(Engine, "gradient", gradient)
    found = together(2, tiny, dataset)
    assert_equal(found, alone)
    assert found["shrunk"] == [(1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at once", "numbers late on one host"])
def test_all_processes_skip_a_step_that_diverged_in_one(
    tiny: Model, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    whole, broken = engines.sample_losses, []
    collect = Mailbox.collect

    def losses(denoiser: Any, batch: Any, config: Any, way: Any, *target: Any) -> Tensor:
        found = whole(denoiser, batch, config, way, *target)
        if way.processes.rank == 1 and not broken:
            broken.append(True)
            return found * float("nan")
        return found

    def one(processes: Processes) -> Found:
        def collected(box: Mailbox, *, wait: bool = False, before: int | None = None) -> Any:
            """As on GPUs, where the numbers of a step may not have arrived yet."""
            is_late = late and processes.is_first and not wait and before is None
            return [] if is_late else collect(box, wait=wait, before=before)

        Mailbox.collect = collected  # type: ignore[method-assign]
        return trained(tiny, dataset, steps=3)

    monkeypatch.setattr(engines, "sample_losses", losses)
    first, second = processes_together(2, one)
    assert [loss == loss for loss in first["losses"]] == [False, True, True]
    assert all(torch.equal(second["tensors"][name], tensor) for name, tensor in first["tensors"].items())


def test_a_process_that_is_stopped_stops_all(hand_made: Trainable, dataset: EncodedDataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "targets": "*attn*"}

    def one(processes: Processes) -> Found:
        class Stopping(NoFiles):
            steps = iter((False, processes.rank == 1))

            def cancelled(self) -> bool:
                return next(self.steps, processes.rank == 1)

        return trained(hand_made, dataset, {"output": tmp_path / "run"}, Stopping(), **settings)

    first, second = processes_together(2, one)
    assert first["reason"] is second["reason"] is Outcome.CANCELLED
    assert len(first["losses"]) == len(second["losses"]) == 2
    assert first["path"] is not None and second["path"] is None
    alone = trained(hand_made, dataset, **settings)
    resumed = trained(hand_made, dataset, {"output": tmp_path / "run"}, **settings)
    assert_alike(resumed["losses"], resumed["tensors"], alone["losses"], alone["tensors"])


def test_fewer_samples_than_processes_are_refused(tiny: Model, dataset: EncodedDataset) -> None:
    with pytest.raises(OptionError, match=r"at least the number of processes, 3, got 2; raise grad_accumulation_ste"):
        together(3, tiny, dataset, batch_size=2)


@pytest.mark.slow
def test_processes_with_other_images_are_refused(tiny: Model, dataset: EncodedDataset) -> None:
    fewer = EncodedDataset(dataset.samples[:-1])
    with pytest.raises(TrainingError, match=r"process 1 differs from the first in the images or captions"):
        processes_together(2, lambda processes: trained(tiny, fewer if processes.rank else dataset))
