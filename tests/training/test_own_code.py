"""Losses, optimizers, schedules and timesteps that Python code passes: trained, resumed, recorded or refused."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import tensors
from torch import Tensor
from torch.optim import lr_scheduler

import lorasmith as ls
from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.named_code import NamedCode
from lorasmith.core.options import config_from
from lorasmith.data.dataset import EncodedDataset
from lorasmith.diffusion.loss_functions import LossBatch
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.optim.optimizers import check_optimizer
from lorasmith.training.optim.update_rules import rule_of
from lorasmith.training.results import TrainResult
from tests.covering import slow_except
from tests.training.methods.gradient_cases import check, gradients, mean

Run = Callable[..., TrainResult]


@pytest.fixture
def run(quick_run: Run) -> Run:
    return quick_run


def squared(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
    """MSE as ours."""
    error = F.mse_loss(prediction, target, reduction="none")
    return (error if batch.places is None else error * batch.places).flatten(1).mean(1)


def falling(progress: float) -> float:
    return 1 - progress


def nadam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, betas=(0.8, 0.95), weight_decay=0.1)


def same(one: TrainResult, other: TrainResult) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return one.losses == other.losses and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def masked(dataset: EncodedDataset) -> EncodedDataset:
    """Samples of which half have a mask."""
    samples = [
        replace(one, places=torch.rand(one.latents.shape[-2:])) if index % 2 else one
        for index, one in enumerate(dataset.samples)
    ]
    return EncodedDataset(tuple(samples))


@pytest.mark.parametrize("settings", slow_except([{}, {"objective": "x0", "loss_weighting": "min_snr"}], {}))
def test_a_loss_that_computes_what_ours_does_trains_the_same(
    run: Run, masked: EncodedDataset, settings: dict[str, Any]
) -> None:
    common = {"batch_size": 3, "steps": 2, "validation_share": 0.2, "validation_draws": 2, **settings}
    ours, own = run(masked, **common), run(masked, loss=squared, **common)
    assert same(ours, own) and ours.validations == own.validations
    assert not same(ours, run(masked, loss=lambda *compared: 2 * squared(*compared), **common))


def cleaner(u: Tensor) -> Tensor:
    return u**2


OWN: dict[str, Any] = {
    "loss": squared,
    "optimizer": nadam,
    "schedule": lambda progress: 0.1 + progress**2,
    "timesteps": cleaner,
}


@pytest.mark.slow
def test_a_run_with_code_of_the_users_continues_to_the_bit_and_is_told_from_others(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    whole = run(dataset, steps=5, **OWN)
    done = itertools.count()
    begun = run(dataset, steps=5, output=tmp_path, cancelled=lambda: next(done) == 2, **OWN)
    assert 0 < len(begun.losses) < 5
    for other in ({"loss": "L1"}, {"optimizer": torch.optim.NAdam}, {"schedule": falling}, {"timesteps": "uniform"}):
        with pytest.raises(OutputError, match="another run"):
            run(dataset, steps=5, output=tmp_path, **{**OWN, **other})
    assert same(run(dataset, steps=5, output=tmp_path, **OWN), whole)
    record = json.loads((tmp_path / "run.json").read_text())
    for part in (record["asked"], record["config"], record["fingerprint"]["config"]):
        assert part["loss_function"] == f"{__name__}:squared"
        assert part["optimizer"] == f"{__name__}:nadam"
        assert part["schedule"] == f"{__name__}:<lambda>"
        assert part["timesteps"] == f"{__name__}:cleaner"


def test_the_loss_is_given_once(hand_made: ls.Trainable, dataset: EncodedDataset) -> None:
    with pytest.raises(OptionError, match="loss and loss_function are one setting, got both"):
        ls.train(hand_made, dataset, loss=squared, loss_function="L1")
    config = ls.TrainConfig(loss_function="L1")
    with pytest.raises(OptionError, match=r"loss_function must be one of MSE.*did you mean 'L1'"):
        ls.train(hand_made, dataset, config=config, loss="L11", progress=False)


def optimized(optimizer: Any, arguments: str | None = None, weight_decay: float = 0.01) -> list[Tensor]:
    """The parameters after three steps at two rates."""
    from tests.training.optim.test_optimizers import Run as Steps

    return [Steps(NamedCode.of(optimizer) if callable(optimizer) else optimizer, arguments, weight_decay=weight_decay)
            .take(range(3)).flat.master]  # fmt: skip


def test_an_optimizer_is_a_name_a_path_a_class_or_a_function() -> None:
    [plain] = optimized("torch.optim.NAdam", "betas=(0.8,0.95)", weight_decay=0.1)
    for one, arguments in (
        ("torch.optim:NAdam", "betas=(0.8,0.95)"),
        (torch.optim.NAdam, "betas=(0.8,0.95)"),
        (functools.partial(torch.optim.NAdam, betas=(0.8, 0.95), weight_decay=0.1), None),
        (lambda groups: torch.optim.NAdam(groups, betas=(0.8, 0.95), weight_decay=0.1), None),
        (nadam, None),
    ):
        assert torch.equal(optimized(one, arguments, weight_decay=0.1)[0], plain)
    assert [rule_of(one).decays for one in (torch.optim.NAdam, "torch.optim:NAdam", nadam)] == [True, True, False]


MADE = torch.optim.SGD([torch.zeros(1)], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "sentence"),
    [
        (
            lambda groups: MADE,
            None,
            "must keep the parameter groups that it gets, in their order, but that of .*lambda",
        ),
        (lambda groups: torch.optim.SGD(groups[1:]), None, "must keep the parameter groups"),
        (lambda groups: 3, None, "optimizer must return a torch optimizer, but .* returned int"),
        (lambda: MADE, None, r"cannot be used with its settings: .*takes 0 positional arguments"),
        (torch.optim.LBFGS, None, "asks for several"),
        (torch.nn.Linear, None, "must be a class of torch optimizers or a function"),
        (functools.partial(torch.optim.SGD, lr=1.0), None, "is the setting learning_rate, but .* has lr; leave it out"),
        (nadam, "eps=1e-7", "optimizer_args are for names and classes, but .*:nadam is a function, got 'eps=1e-7'"),
    ],
)
def test_what_makes_no_optimizer_is_refused(optimizer: Any, arguments: str | None, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        check_optimizer(NamedCode.of(optimizer), weight_decay=0.0, arguments=arguments, rates=(1e-3, 1e-2))


def test_state_that_a_function_hides_is_found_out() -> None:
    with pytest.raises(OptionError, match=r"makes one, not one of other parameters, got an object of class SGD"):
        TrainConfig(optimizer=MADE)  # type: ignore[arg-type]
    counted = itertools.count(1)

    class Slowing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["lr"] /= next(counted)
            super().step()

    with pytest.raises(OptionError, match="must continue exactly from its saved state, but"):
        check_optimizer(NamedCode.of(functools.partial(Slowing)), weight_decay=0.0)


def factors(schedule: Any, **settings: Any) -> list[float]:
    config = TrainConfig(**{"steps": 10, "learning_rate": 1e-3, "schedule": schedule, **settings})
    return [config_of(config).scheduled(step) for step in range(config.steps)]


def config_of(config: TrainConfig) -> Any:
    from lorasmith.training.config import ResolvedConfig

    decided = {"alpha": 1.0, "targets": "all", "timesteps": "uniform", "min_noise": 0.0, "max_noise": 1.0}
    return ResolvedConfig.of(config, **decided, training_dtype="fp32")


def test_a_schedule_of_the_users_is_a_function_of_the_progress() -> None:
    assert factors(falling) == factors("linear") == factors(f"{__name__}:falling")
    shaped = {"warmup_steps": 3, "final_rate": 0.2}
    assert factors(falling, **shaped) == factors("linear", **shaped)
    assert factors(lambda progress: 1 + progress)[5] == 1.5, "above the full rate, too"


@pytest.mark.parametrize(
    "scheduler",
    [
        functools.partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
        functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
        functools.partial(lr_scheduler.OneCycleLR, max_lr=5e-3, total_steps=7, cycle_momentum=False),
        lr_scheduler.LinearLR,
        "torch.optim.lr_scheduler:LinearLR",
    ],
)
def test_a_scheduler_of_torch_gives_its_own_rates_after_the_warm_up(scheduler: Any) -> None:
    own = lr_scheduler.LinearLR if isinstance(scheduler, str) else scheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs, expected = own(optimizer), []
    for _ in range(7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = factors(scheduler, warmup_steps=3)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [1e-3 * factor for factor in found[3:]] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (
            lambda progress: float("nan"),
            "a finite factor of the learning rate, at least 0, but .* returned nan at prog",
        ),
        (lambda progress: 0.5 - progress, "returned -0.5 at progress 1"),
        (
            lambda progress: random.random(),
            r"the progress alone, but .* returned 0\.\d+ and then 0\.\d+ at progress 0;",
        ),
        (lambda progress: None, "cannot be used: float.* pass a function of the progress, as lambda"),
        (lambda step, steps: 1.0, "cannot be used: .*missing 1 required positional argument"),
        (
            lr_scheduler.StepLR,
            "cannot be used: .*'step_size'.* or one of torch's schedulers with all arguments but its optimizer",
        ),
        (lr_scheduler.ReduceLROnPlateau, "cannot be used: .*'metrics'"),
        (functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=10), "cannot be used: .*cycle_momentum"),
        (
            functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=5, cycle_momentum=False),
            "Tried to step 6 times",
        ),
    ],
)
def test_a_schedule_that_gives_no_factor_is_refused_before_the_run(
    hand_made: ls.Trainable, schedule: Any, sentence: str
) -> None:
    with pytest.raises(OptionError, match=f"schedule .*{sentence}"):
        plan_job(hand_made, TrainConfig(steps=10, schedule=schedule), torch.device("cpu"))


def test_settings_without_effect_are_said_of_code_of_the_users(hand_made: ls.Trainable) -> None:
    settings: dict[str, Any] = {"optimizer": nadam, "weight_decay": 0.5, "schedule": falling, "schedule_cycles": 5}
    notes = " ".join(plan_job(hand_made, config_from(TrainConfig, settings), torch.device("cpu")).notes)
    assert f"weight_decay 0.5 has no effect with {__name__}:nadam" in notes
    assert f"schedule_cycles 5 has no effect with schedule {__name__}:falling" in notes


def test_timesteps_of_the_users_are_those_that_are_drawn(hand_made: ls.Trainable, dataset: EncodedDataset) -> None:
    def drawn(timesteps: Any) -> list[float]:
        config = TrainConfig(timesteps=timesteps, batch_size=8, timestep_shift=1.0)
        job = plan_job(hand_made, config, "cpu")
        batches = engine.batch_maker(job.model, dataset, job.config, job.way).step(0)
        return [quantile for batch in batches for quantile in batch.quantiles]

    uniform = drawn("uniform")
    ls.register("timesteps", "cleaner", cleaner)
    for door in (cleaner, f"{__name__}:cleaner", "cleaner"):
        assert drawn(door) == pytest.approx([quantile**2 for quantile in uniform], abs=1e-6)


RULE = r"timesteps must be a function of uniform numbers \(n,\) that returns quantiles \(n,\), each from 0 to 1"


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        (
            torch.rand_like,
            f"{RULE}, the same in every call, but .* returns others in a second call; take no rand",
        ),
        (lambda u: 2 * u, f"{RULE}, but .* returns values from 0 to 2 for 257; pass one such as"),
        (lambda u: u.log(), "returns values from -inf to 0 for 257"),
        (lambda u: 0.5, "returns 0.5 for 257; pass one such as lambda u"),
        (lambda u: u.mean(), r"returns a tensor of shape \(\) in float32 for 257"),
        (lambda u: u.squeeze(), r"returns a tensor of shape \(\) in float32 for 1;"),
        (lambda u: u.double().numpy(), "returns a ndarray for 257"),
        (lambda u: (u > 0.5).long(), r"in int64"),
        (lambda u: (u - u.min()) / 2, "each of one number alone, but those of .* depend on the others"),
        (lambda u, size: u, "fails: .*missing 1 required positional argument"),
        (lambda u: 1 - u, "must ascend with the uniform numbers, but .* does not"),
        (torch.nn.Linear, "fails: "),
    ],
)
def test_timesteps_that_draw_no_levels_are_refused_before_the_run(
    hand_made: ls.Trainable, timesteps: Any, sentence: str
) -> None:
    for name in (timesteps, "registered"):
        if name == "registered":
            ls.register("timesteps", "registered", timesteps)
        with pytest.raises(OptionError, match=sentence):
            plan_job(hand_made, TrainConfig(steps=10, timesteps=name), torch.device("cpu"))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (lambda level, scale, gamma: torch.rand_like(scale), "the same in every call, but mine returns others"),
        (lambda level, scale, gamma: -scale, "each at least 0, but mine returns values from -"),
        (lambda level, scale, gamma: 1.0, "but mine returns 1.0 for 257"),
        (lambda level: level.alpha, "but mine fails: .*takes 1 positional argument"),
    ],
)
def test_weights_of_the_users_that_are_none_are_refused_before_the_run(
    hand_made: ls.Trainable, weights: Any, sentence: str
) -> None:
    ls.register("weightings", "mine", weights)
    with pytest.raises(OptionError, match=f"loss_weighting must be a function of level.*{sentence}"):
        plan_job(hand_made, TrainConfig(steps=10, loss_weighting="mine"), torch.device("cpu"))


def anchored(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
    """MSE, and the distance from the frozen model's prediction."""
    frozen = batch.frozen()
    assert frozen is batch.frozen() and not frozen.requires_grad and frozen.dtype == torch.float32
    return mean(prediction - target) + 0.5 * mean(prediction - frozen)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"activations": "lean"}])
def test_a_loss_asks_for_the_prediction_of_the_frozen_model(
    hand_made: ls.Trainable, dataset: EncodedDataset, settings: dict[str, Any]
) -> None:
    def reference(batch: Any, trained: Any, frozen: Any, target: Tensor) -> Tensor:
        prediction = trained(batch.conditioning)
        return mean(prediction - target) + 0.5 * mean(prediction - frozen(batch.conditioning))

    check(gradients(hand_made, dataset, reference, loss_function=anchored, **settings))


def test_the_frozen_prediction_is_what_the_objective_compares_and_a_run_with_it_continues(
    run: Run, dataset: EncodedDataset, tmp_path: Path
) -> None:
    seen = []

    def distance(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
        seen.append(float((prediction.detach() - batch.frozen()).abs().max()))
        return anchored(prediction, target, batch)

    own: dict[str, Any] = {"steps": 3, "objective": "x0", "loss": distance}
    whole = run(dataset, **own)
    assert seen[0] == 0 and seen[-1] > 0  # a fresh LoRA is the identity
    done = itertools.count()
    assert len(run(dataset, output=tmp_path, cancelled=lambda: next(done) == 1, **own).losses) == 1
    assert same(run(dataset, output=tmp_path, **own), whole)


def test_no_frozen_model_is_asked_outside_of_a_step(hand_made: ls.Trainable, dataset: EncodedDataset) -> None:
    job = plan_job(hand_made, TrainConfig(rank=2, targets="*attn*"), "cpu")
    (batch,) = engine.batch_maker(job.model, dataset, job.config, job.way).step(0)
    with pytest.raises(OptionError, match=r"batch.frozen\(\) is for a loss in a step of a run that trains alone"):
        batch.frozen()
