"""Runs that train together over one model: the losses and weights of each are those that it has alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lever_cases import VARIANTS, flux_dataset
from torch import Tensor

from lorasmith.adapters.patch import Patch
from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.options import config_from
from lorasmith.data.captions import CaptionRules
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Picture, Variants
from lorasmith.families.conditionings import PictureSize
from lorasmith.families.model import Model
from lorasmith.runs.run import Host, run
from lorasmith.training import joint
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine
from lorasmith.training.events import Event, Outcome, RolledBack, Shrunk, StepDone, Warned
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.joint import EngineMaker, StopOfAll, check_alike, check_captions, train_jointly
from lorasmith.training.results import TrainResult
from lorasmith.training.train import Plan, RunHost, run_job
from lorasmith.training.validation import History
from tests.hosts import NoFiles
from tests.training.together_cases import ALIKE, weights

Settings = dict[str, Any]


def job(model: Model, settings: Settings) -> TrainJob:
    return plan_job(model.denoiser, config_from(TrainConfig, {**ALIKE, **settings}), torch.device("cpu"))


@dataclass(frozen=True)
class Around:
    """What a run has besides model, settings and data."""

    host: Host = field(default_factory=NoFiles)
    output: Path | None = None
    until: int | None = None

    def plan(self, model: Model, one: TrainJob, data: EncodedDataset) -> Plan:
        return Plan(denoiser=model.denoiser, job=one, data=data, output=self.output, until=self.until)


def work(model: Model, one: TrainJob, data: EncodedDataset, around: Around) -> Callable[[EngineMaker], TrainResult]:
    return partial(run, around.plan(model, one, data), around.host)


def together(
    model: Model, data: EncodedDataset | Sequence[EncodedDataset], runs: Sequence[Settings], *around: Around
) -> list[TrainResult | Exception]:
    each = [data] * len(runs) if isinstance(data, EncodedDataset) else data
    events: list[Event] = []
    given = around or [Around(NoFiles(also=events.append))] * len(runs)
    jobs = [job(model, one) for one in runs]
    results = train_jointly(jobs, [work(model, *parts) for parts in zip(jobs, each, given, strict=True)])
    said = [one.message for one in events if isinstance(one, Warned)]
    assert not [one for one in said if "a pass for each run" in one], "the passes are those of all runs"
    return results


def alone(
    model: Model,
    data: EncodedDataset,
    settings: Settings,
    around: Around = Around(),
) -> TrainResult:
    return run(around.plan(model, job(model, settings), data), around.host)


def assert_alike(one: TrainResult | Exception, other: TrainResult, tolerance: float = 1e-5) -> None:
    assert isinstance(one, TrainResult), repr(one)
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    assert [step for step, _ in one.validations] == [step for step, _ in other.validations]
    assert [loss for _, loss in one.validations] == pytest.approx(
        [loss for _, loss in other.validations], rel=tolerance
    )
    expected, found = weights(other), weights(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # one by one, as those that start at zero are small
        assert (found[name] - tensor).norm() <= 20 * tolerance * tensor.norm() + 1e-9, name


def assert_as_alone(
    results: Sequence[TrainResult | Exception], model: Model, data: EncodedDataset, runs: Sequence[Settings]
) -> None:
    for result, settings in zip(results, runs, strict=True):
        assert_alike(result, alone(model, data, settings))


def assert_same(one: TrainResult | Exception, other: TrainResult | Exception) -> None:
    assert isinstance(one, TrainResult) and isinstance(other, TrainResult), (one, other)
    assert one.losses == other.losses
    assert all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(other).items())


MIXED: list[Settings] = [
    {"steps": 4, "rank_dropout": 0.3},
    {"rank": 2, "seed": 5, "batch_size": 2, "ema_decay": 0.9},
    {"algorithm": "OFT", "learning_rate": 0.01},
    {"steps": 2, "targets": "attention+ff", "grad_accumulation_steps": 2, "min_snr_gamma": 5.0},
]


@pytest.mark.slow
def test_each_run_is_the_one_that_it_is_alone(tiny: Model, dataset: EncodedDataset, mixed: EncodedDataset) -> None:
    """With data, sizes of pictures and lengths of captions of their own."""
    data = [dataset, mixed, dataset, mixed]
    before = {name: tensor.clone() for name, tensor in tiny.components.denoiser.state_dict().items()}
    results = together(tiny, data, MIXED)
    for result, own, settings in zip(results, data, MIXED, strict=True):
        assert_alike(result, alone(tiny, own, settings))
    after = tiny.components.denoiser.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_two_runs_on_a_quantized_model_are_those_that_they_are_alone(flux: Model, flux_data: EncodedDataset) -> None:
    runs: list[Settings] = [{"quantization": "nf4"}, {"quantization": "nf4", "rank": 2, "batch_size": 2, "steps": 2}]
    assert_as_alone(together(flux, flux_data, runs), flux, flux_data, runs)


ALGORITHMS: dict[str, Settings] = {
    **VARIANTS,
    "LoRA": {"targets": "all"},
    "Full": {"algorithm": "Full", "learning_rate": 1e-4},
    "AdamW": {"optimizer": "AdamW", "learning_rate": 1e-4},
    "half precision": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("levers", [{}, {"quantization": "nf4", "gradient_checkpointing": True}])
def test_each_algorithm(flux: Model, flux_data: EncodedDataset, name: str, levers: Settings) -> None:
    assert_each_alike(flux, flux_data, name, levers)


def assert_each_alike(model: Model, data: EncodedDataset, name: str, levers: Settings) -> None:
    """Two runs of an algorithm and one of another."""
    levers = levers | ({"training_dtype": "bf16"} if name == "half precision" else {})
    runs = [one | levers for one in (ALGORITHMS[name], {"rank": 8}, ALGORITHMS[name] | {"seed": 8})]
    results = together(model, data, runs)
    for result, settings in zip(results, runs, strict=True):
        expected = alone(model, data, settings)
        if name == "half precision":
            assert isinstance(result, TrainResult)
            assert result.losses == pytest.approx(expected.losses, rel=1e-2)
        else:  # AdamW divides by the size of a gradient
            assert_alike(result, expected, 1e-3 if name == "AdamW" else 1e-5)


@pytest.fixture(scope="module")
def flux_data() -> EncodedDataset:
    return flux_dataset()


@pytest.mark.slow
def test_held_out_images_are_judged_with_each_run_s_own_adapter(
    flux: Model, flux_data: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "should_stop", lambda self, patience: patience == 1)
    runs: list[Settings] = [
        {"steps": 6, "validation_share": 0.3, "validate_every": 2, "patience": 1},
        {"steps": 5, "validation_share": 0.3, "validate_every": 2, "rank": 2, "ema_decay": 0.9},
        {"steps": 4},
    ]
    results = together(flux, flux_data, runs)
    for result, settings in zip(results, runs, strict=True):
        assert_alike(result, alone(flux, flux_data, settings), 1e-4)
    assert isinstance(results[0], TrainResult) and results[0].reason is Outcome.STOPPED
    assert isinstance(results[1], TrainResult) and len(results[1].losses) == 5


def test_a_run_that_diverges_or_fails_disturbs_no_other(
    flux: Model, flux_data: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    whole = joint.prediction_losses

    def losses(prediction: Any, batch: Any, config: Any, parameterization: Any) -> Tensor:
        return whole(prediction, batch, config, parameterization) * (math.nan if config.rank == 2 else 1)

    monkeypatch.setattr(joint, "prediction_losses", losses)

    def broken(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise TrainingError("the disk is gone")

    runs: list[Settings] = [
        {"steps": 5},
        {"steps": 5, "rank": 2, "max_rollbacks": 1},
        {"steps": 5, "seed": 9},
        {"steps": 5, "seed": 7},
    ]
    hosts = [NoFiles(), NoFiles(also=events.append), NoFiles(also=broken), NoFiles()]
    results = together(flux, flux_data, runs, *map(Around, hosts))
    assert_alike(results[0], alone(flux, flux_data, runs[0]))
    assert_alike(results[3], alone(flux, flux_data, runs[3]))
    assert isinstance(results[1], TrainingError) and any(isinstance(one, RolledBack) for one in events)
    assert isinstance(results[2], TrainingError) and str(results[2]).startswith("the disk is gone")


FAILURES = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "Memory is too small for a step of 2 runs at once (2.00 GiB more were needed): the step is repeated, with",
    ),
    (TypeError("a bug"), "A pass of 2 runs at once failed (TypeError: a bug): the step is repeated, with a pass for"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "sentence"), FAILURES)
def test_where_a_pass_of_all_fails_each_run_has_passes_of_its_own(
    flux: Model, flux_data: EncodedDataset, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    """And where memory is too small for one of them, that one recovers alone."""
    whole, failed = Engine.gradient, []

    def full(*_: Any) -> None:
        raise error

    def gradient(self: Engine, batches: Any) -> Any:
        if self.config.batch_size == 2 and self.way.micro_batch == 2:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batches)

    monkeypatch.setattr(joint._Coordinator, "_pass", full)
    monkeypatch.setattr(Engine, "gradient", gradient)
    runs: list[Settings] = [{"batch_size": 2}, {"rank": 2}]
    events: list[list[Event]] = [[], []]
    results = together(flux, flux_data, runs, *[Around(NoFiles(also=one.append)) for one in events])
    monkeypatch.undo()
    assert_as_alone(results, flux, flux_data, runs)
    for told in events:
        said = [one.message for one in told if isinstance(one, Warned) and "2 runs at once" in one.message]
        assert len(said) == 1 and said[0].startswith(sentence)
    assert [[one.micro_batch for one in told if isinstance(one, Shrunk)] for told in events] == [[1], []]
    assert failed == [True]


def test_a_stop_between_two_runs_ends_both_after_the_same_step(flux: Model, flux_data: EncodedDataset) -> None:
    looks: list[int] = []
    stop = StopOfAll(lambda: len(looks) >= 3)  # which becomes true while the first run works

    def look(event: Event) -> None:
        if isinstance(event, StepDone):
            looks.append(event.step)

    jobs = [job(flux, {"steps": 9}), job(flux, {"steps": 9, "rank": 2})]

    class Stopped(NoFiles):
        def cancelled(self) -> bool:
            return stop.is_set()

    works = [
        work(flux, one, flux_data, Around(host))
        for one, host in zip(jobs, [Stopped(also=look), Stopped()], strict=True)
    ]
    results = train_jointly(jobs, works, each_round=stop.look)
    steps = [len(one.losses) for one in results if isinstance(one, TrainResult)]
    assert len(steps) == 2 and steps[0] == steps[1] < 9


@pytest.mark.slow
def test_runs_that_are_stopped_continue_together_to_the_bit_and_alone_to_rounding(
    flux: Model, flux_data: EncodedDataset, tmp_path: Path
) -> None:
    runs: list[Settings] = [{"steps": 5}, {"steps": 4, "rank": 2, "algorithm": "LoKr"}]
    outputs = [Around(output=tmp_path / str(number)) for number in range(2)]
    whole = together(flux, flux_data, runs)
    for one in together(flux, flux_data, runs, *[replace(one, until=2) for one in outputs]):
        assert isinstance(one, TrainResult) and one.reason is Outcome.CANCELLED and len(one.losses) == 2
    third = [replace(one, until=3) for one in outputs]
    together(flux, flux_data, runs, *third)
    for one, other in zip(together(flux, flux_data, runs, *outputs), whole, strict=True):
        assert_same(one, other)

    again = [Around(output=tmp_path / f"again {number}") for number in range(2)]
    together(flux, flux_data, runs, *[replace(one, until=2) for one in again])
    for one, settings, around in zip(whole, runs, again, strict=True):
        assert_alike(one, alone(flux, flux_data, settings, around))


@pytest.mark.slow
def test_an_interruption_reaches_all_runs_which_save(flux: Model, flux_data: EncodedDataset, tmp_path: Path) -> None:
    whole, passes = joint._Coordinator._answer, []

    def answer(self: Any, asking: Any) -> None:
        passes.append(len(asking))
        if len(passes) == 3:
            raise KeyboardInterrupt  # as from a signal, in the thread that leads
        whole(self, asking)

    outputs = [Around(output=tmp_path / str(number)) for number in range(2)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(joint._Coordinator, "_answer", answer)
        together(flux, flux_data, [{}, {"rank": 2}], *outputs)
    saved = [one.name for number in range(2) for one in (tmp_path / str(number)).glob("*.safetensors")]
    assert saved == ["lora.safetensors"] * 2
    results = together(flux, flux_data, [{}, {"rank": 2}], *outputs)
    assert_as_alone(results, flux, flux_data, [{}, {"rank": 2}])


class Looks:
    """In place of previews: looks whether the model is bare, as for users who load it."""

    steps, in_place = (2,), False

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self.seen = module, []  # type: ignore[var-annotated]
        self._whole = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def draw_base(self, step: int) -> Generator[Event, None, None]:
        return self(step, Path(), final=False)

    def __call__(self, step: int, lora: Path, *, final: bool) -> Generator[Event, None, None]:
        now = self._module.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in self._whole.items())
        assert not any("forward" in vars(one) for one in self._module.modules())
        self.seen.append((step, final))
        yield from ()


@pytest.mark.slow
def test_previews_find_the_bare_model_and_the_other_runs_wait(
    flux: Model, flux_data: EncodedDataset, tmp_path: Path
) -> None:
    runs: list[Settings] = [{"quantization": "nf4", "steps": 4, "preview_every": 2}, {"quantization": "nf4", "rank": 2}]
    jobs, looks = [job(flux, one) for one in runs], Looks(flux.components.denoiser)

    class Looking(RunHost):
        def begin(self, plan: Plan, folder: Path) -> Looks:
            return looks

    plans = Around(output=tmp_path / "run").plan(flux, jobs[0], flux_data), Around().plan(flux, jobs[1], flux_data)
    results = train_jointly(jobs, [partial(run_job, plans[0], Looking()), partial(run_job, plans[1], RunHost())])
    assert looks.seen == [(0, False), (2, False), (4, True)]
    assert_as_alone(results, flux, flux_data, runs)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "nf4"}, "must have the same quantization, got 'none' and 'nf4'; make them equal, or train"),
        ({"training_dtype": "bf16", "exact_dtype": True}, "must have the same training_dtype, got 'fp32' and 'bf16'"),
        ({"gradient_checkpointing": True}, "must have the same gradient_checkpointing, got False and True"),
        ({"activations": "lean"}, "must have the same activations"),
        ({"deterministic": True}, "must have the same deterministic"),
        (
            {"compile": True},
            "use none of init, compile, cuda_graphs, autotune, got compile on; leave it out, or train apart",
        ),
        ({"cuda_graphs": True}, "got cuda_graphs on"),
        ({"autotune": True}, "got autotune on"),
    ],
)
def test_runs_that_cannot_share_a_model_are_refused(flux: Model, settings: Settings, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        check_alike([job(flux, {}), job(flux, settings)])


def test_a_lone_run_is_refused_for_what_it_would_not_do(flux: Model) -> None:
    with pytest.raises(OptionError, match="got compile on; leave it out, or train apart"):
        check_alike([job(flux, {"compile": True})])


def test_models_devices_loras_and_processes_that_differ_are_refused(flux: Model, tiny: Model) -> None:
    one = job(flux, {})
    with pytest.raises(OptionError, match=r"must have one model, got .* loaded one by one; load it once"):
        check_alike([one, job(tiny, {})])
    with pytest.raises(OptionError, match="must have the same device, got 'cpu' and 'meta'"):
        check_alike([one, replace(one, way=replace(one.way, device=torch.device("meta")))])
    path, adapter = next(iter(one.adapters.items()))
    patched = replace(one, model=one.model.patched(Patch({path: adapter.to_weights()})))
    with pytest.raises(OptionError, match="same LoRAs beneath them, but training_adapter, existing_lora or"):
        check_alike([one, patched])

    class Two:
        size = 2

    several = replace(one, way=replace(one.way, processes=Two()))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="are trained in one process, got 2; start one"):
        check_alike([several, several])


def test_captions_whose_encoder_would_stay_are_refused(flux: Model, flux_data: EncodedDataset) -> None:
    one = job(flux, {})
    check_captions(one, flux_data)
    captions = EncodedCaptions(lambda text: flux_data.samples[0].conditioning, memory_bytes=0)
    size = PictureSize((64, 64), (0, 0), (64, 64))
    varied = [
        replace(
            one,
            variants=Variants(
                (Picture(one.latents, size),), (f"cat {number}",), CaptionRules(), captions, lambda text, size: text
            ),
        )
        for number, one in enumerate(flux_data.samples)
    ]
    with pytest.raises(OptionError, match="encode their captions before they train, but the variants of these need"):
        check_captions(one, EncodedDataset(tuple(varied), captions=captions))
