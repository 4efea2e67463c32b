"""Losses per sample, and how the clean-sample objective weighs the native one."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import NamedCode
from lorasmith.diffusion.loss_functions import LOSSES, LossBatch, check_loss
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule, FlowSchedule, NoiseSchedule
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig

SD = DiscreteSchedule.scaled_linear()
OBJECTIVES = ("native", "x0")
QUANTILES = torch.tensor([0.02, 0.3, 0.6, 0.97])
SCHEDULES: dict[str, NoiseSchedule] = {"epsilon": SD, "v": SD, "flow": FlowSchedule(3.0)}


def loss(
    parameterization: str, objective: str, loss_function: str = "MSE", dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    clean, noise, error = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3))
    level = SCHEDULES[parameterization].at(QUANTILES)
    prediction = PARAMETERIZATIONS[parameterization].target(clean, noise, level) + 0.1 * error
    return diffusion_loss(
        prediction.to(dtype),
        Batch(clean, noise, level.noised(clean, noise), level, Conditioning({}), ()),
        parameterization=parameterization,
        objective=objective,
        loss_function=loss_function,
    )


WEIGHTS = {
    # In sampler sigmas (noise-to-signal ratios): sigma² for epsilon, sigma²/(sigma² + 1) for v; the flow's own sigma².
    "epsilon": lambda: SD.sigmas[(QUANTILES * 1000).long()] ** 2,
    "v": lambda: SD.sigmas[(QUANTILES * 1000).long()] ** 2 / (SD.sigmas[(QUANTILES * 1000).long()] ** 2 + 1),
    "flow": lambda: (3 * QUANTILES / (1 + 2 * QUANTILES)) ** 2,
}


def test_the_clean_sample_objective_is_the_native_one_weighted() -> None:
    for parameterization in WEIGHTS:
        native, clean = loss(parameterization, "native"), loss(parameterization, "x0")

        torch.testing.assert_close(clean, native * WEIGHTS[parameterization](), rtol=1e-3, atol=1e-7)


def test_a_perfect_prediction_costs_nothing() -> None:
    for objective in OBJECTIVES:
        for parameterization in SCHEDULES:
            for loss_function in LOSSES:
                generator = torch.Generator().manual_seed(0)
                clean, noise = (torch.randn(4, 2, 3, generator=generator) for _ in range(2))
                level = SCHEDULES[parameterization].at(QUANTILES)
                cost = diffusion_loss(
                    PARAMETERIZATIONS[parameterization].target(clean, noise, level),
                    Batch(
                        clean, noise, level.noised(clean, noise), level, Conditioning({}), (), settings=TrainConfig()
                    ),
                    parameterization=parameterization,
                    objective=objective,
                    loss_function=loss_function,
                )

                assert cost.shape == (4,)
                assert cost.max() < 1e-5


def test_losses_are_torchs_means_per_sample() -> None:
    for name, reference in [
        ("MSE", F.mse_loss),
        ("L1", F.l1_loss),
        ("Huber", F.huber_loss),
        ("SmoothL1", F.smooth_l1_loss),
    ]:
        generator = torch.Generator().manual_seed(0)
        prediction, clean, noise = (3 * torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3))
        level = SD.at(QUANTILES)
        found = diffusion_loss(
            prediction,
            Batch(clean, noise, level.noised(clean, noise), level, Conditioning({}), ()),
            parameterization="epsilon",
            objective="native",
            loss_function=name.lower(),
        )

        assert found.shape == (4,)
        for i in range(4):
            torch.testing.assert_close(found[i], reference(prediction[i], noise[i]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_predictions_are_compared_in_fp32(objective: str) -> None:
    half = loss("epsilon", objective, dtype=torch.bfloat16)

    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss("epsilon", objective), rtol=0.05, atol=1e-6)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(OptionError, match=r"^unknown loss function 'MSSE' \(did you mean 'MSE'\?\)"):
        loss("epsilon", "native", "MSSE")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parameterization", SCHEDULES)
def test_nothing_outside_of_a_mask_has_a_gradient(parameterization: str, objective: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, drawn = (torch.randn(2, 4, 6, 6, generator=generator) for _ in range(3))
    prediction = drawn.requires_grad_()
    level = SCHEDULES[parameterization].at(torch.tensor([0.2, 0.7]))
    places = torch.ones(2, 1, 6, 6)
    places[0, :, :3], places[0, :, 3:] = 2.0, 0.0

    batch = Batch(clean, noise, level.noised(clean, noise), level, Conditioning({}), ())

    def losses(rows: slice, **more: Any) -> Tensor:
        return diffusion_loss(
            prediction[:, :, rows],
            replace(batch, **{name: getattr(batch, name)[:, :, rows] for name in ("clean", "noise", "noised")}, **more),
            parameterization=parameterization,
            objective=objective,
            loss_function="MSE",
        )

    masked = losses(slice(None), places=places)
    masked.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[0, :, 3:].eq(0).all() and prediction.grad[0, :, :3].ne(0).all()
    assert prediction.grad[1].ne(0).all()
    assert torch.equal(masked[1], losses(slice(None))[1]), "weights of 1 are no weights"
    # Divided by their mean, the weights make the loss the mean of what is inside.
    assert masked[0].item() == pytest.approx(losses(slice(3))[0].item())


def batch_of(prediction: Tensor) -> Batch:
    level = SD.at(QUANTILES)
    clean, noise = torch.randn(prediction.shape), torch.randn(prediction.shape)
    places = torch.rand(4, 1, *prediction.shape[2:])
    return Batch(clean, noise, level.noised(clean, noise), level, Conditioning({}), tuple("abcd"), places=places)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_of_the_users_gets_what_is_compared_and_the_batch(objective: Any) -> None:
    seen: list[tuple[Tensor, Tensor, LossBatch]] = []

    def loss(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
        seen.append((prediction, target, batch))
        return (prediction - target).flatten(1).norm(dim=1).bfloat16() * batch.level.sigma

    prediction = torch.randn(4, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    batch = batch_of(prediction)
    settings: Any = {"parameterization": "epsilon", "objective": objective}
    found = diffusion_loss(prediction, batch, loss_function=NamedCode.of(loss), **settings)
    assert (found.shape, found.dtype, found.requires_grad) == ((4,), torch.float32, True)
    [(compared, target, given)] = seen
    assert given is batch and compared.dtype == target.dtype == torch.float32
    assert torch.equal(target, batch.clean if objective == "x0" else batch.noise)
    errors = (compared - target).flatten(1)
    whole = diffusion_loss(prediction, replace(batch, places=None), loss_function="MSE", **settings)
    torch.testing.assert_close(errors.square().mean(1), whole)


def test_what_a_loss_returns_is_checked() -> None:
    for loss, got in [
        (lambda prediction, target, batch: (prediction - target).mean(), r"got a tensor of shape \(\) in float32"),
        (lambda prediction, target, batch: prediction - target, r"got a tensor of shape \(4, 2, 3, 3\) in float32"),
        (lambda prediction, target, batch: prediction.flatten(1).argmax(1), r"of shape \(4,\) in int64"),
        (lambda prediction, target, batch: prediction.detach().flatten(1).mean(1), "got a tensor without a gradient"),
        (lambda prediction, target, batch: 0.5, "got float"),
    ]:
        prediction = torch.randn(4, 2, 3, 3, requires_grad=True)
        settings: Any = {"parameterization": "v", "objective": "native", "loss_function": NamedCode.of(loss)}
        with pytest.raises(OptionError, match=rf"must return a differentiable float tensor of shape \(4,\), .*{got}"):
            diffusion_loss(prediction, batch_of(prediction), **settings)


def test_a_loss_takes_three_arguments() -> None:
    check_loss("mse")
    check_loss(lambda *compared: compared[0])
    for loss in (lambda prediction, target: prediction, torch.nn.MSELoss(), functools.partial(F.mse_loss, input=0)):
        with pytest.raises(OptionError, match=r"loss must be a function of prediction, target and batch, which"):
            check_loss(loss)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_is_that_of_sd_scripts(schedule: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    level = SD.at(QUANTILES)

    def found(bound: float) -> Tensor:
        settings: Any = TrainConfig(huber_c=bound, huber_schedule=schedule, huber_scale=scale)
        share = SD.share(level.time).float()
        batch = Batch(target, target, target, level, Conditioning({}), (), settings=settings, share=share)
        return LOSSES["PseudoHuber"](prediction, target, batch)

    expected = []
    for index in range(4):
        ratio = float(level.sigma[index] / level.alpha[index])
        bound = {
            "constant": 0.1 * scale,
            "exponential": math.exp(math.log(0.1) / 1000 * float(level.time[index])) * scale,
            "snr": (1 - 0.1) / (1 + ratio) ** 2 + 0.1,
        }[schedule]
        errors = (prediction[index] - target[index]).flatten().tolist()
        expected.append(sum(2 * bound * (math.sqrt(error**2 + bound**2) - bound) for error in errors) / len(errors))
    torch.testing.assert_close(found(0.1), torch.tensor(expected))
    if schedule == "constant":
        torch.testing.assert_close(found(100.0), (prediction - target).square().flatten(1).mean(1), rtol=1e-2, atol=0)
