"""Loss of predictions, and the weights of noise levels in it.

Losses (`loss_functions.py`) map prediction and target to (batch,). Weights are pure functions of the level, the kind of
prediction and gamma, defined for the squared error of the clean sample, as in the papers. `scale` converts them to the
objective: the clean error per error of the prediction, 1 if clean samples are compared. With MSE a weighted run is
therefore the same for both objectives, except with `none`.

    min_snr        min(SNR, gamma)                (Hang et al. 2023, arXiv:2303.09556)
    soft_min_snr   SNR · gamma / (SNR + gamma)    (Crowson et al. 2024, arXiv:2401.11605, with sigma_data² = 1/gamma)

    debiased       √min(SNR, 1000)                (Yu et al. 2023, arXiv:2310.08442)
                                                  sd-scripts has another one for v, 1 / (SNR + 1)
    p2             SNR / (1 + SNR)                (Choi et al. 2022, arXiv:2204.00227, with k = gamma = 1)
    sigma_sqrt     1 / sigma²                     (Esser et al. 2024, arXiv:2403.03206, as in SD3's scripts)
    cosmap         2 / (π (alpha² + sigma²))      (the same; alpha = 1 − sigma)

SNR is alpha²/sigma². On predictions, min_snr is the familiar min(SNR, gamma)/SNR of epsilon and min(SNR, gamma)/(SNR+1)
of v; of a flow it is min(alpha², gamma · sigma²), most where alpha = √gamma · sigma and none at both ends, and
sigma_sqrt is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorasmith.core.choices import WEIGHTINGS, Objective
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import code_of
from lorasmith.diffusion.loss_functions import LOSSES, LossBatch
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, NoiseLevel


def diffusion_loss(
    prediction: Tensor,
    batch: LossBatch,
    *,
    parameterization: str,
    objective: Objective,
    loss_function: str,
    target: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, fp32 (batch,), without the weight of its noise level (`loss_weights`).

    `target` replaces what the model is to predict, fp32 (batch, ...). With MSE the `x0` objective (as in ComfyUI's
    trainer) equals the native one times sigma²/alpha² (epsilon) or sigma² (v and flow). `prediction` (batch, ...) is of
    any float dtype. Raises OptionError if a user's loss returns something else.
    """
    kind = PARAMETERIZATIONS[parameterization]
    prediction = compared(prediction, batch, parameterization=parameterization, objective=objective)
    if objective == "x0":
        target = batch.clean if target is None else kind.clean(target, batch.noised, batch.level)
    elif target is None:
        target = kind.target(batch.clean, batch.noise, batch.level)
    losses = code_of(loss_function, LOSSES)(prediction, target, batch)
    check_losses(losses, len(prediction), f"loss {loss_function}", differentiable=prediction.requires_grad)
    return losses.float()


def compared(prediction: Tensor, batch: LossBatch, *, parameterization: str, objective: Objective) -> Tensor:
    """What `objective` compares of a prediction (batch, ...), fp32."""
    prediction = prediction.float()
    if objective == "native":
        return prediction
    return PARAMETERIZATIONS[parameterization].clean(prediction, batch.noised, batch.level)


def check_losses(losses: object, count: int, what: str, *, differentiable: bool = True) -> None:
    """Raise OptionError unless these are the losses of `count` samples; `what` computed them."""
    if not isinstance(losses, Tensor):
        got = type(losses).__name__
    elif losses.shape != (count,) or not losses.is_floating_point():
        got = f"a tensor of shape {tuple(losses.shape)} in {str(losses.dtype).removeprefix('torch.')}"
    elif differentiable and not losses.requires_grad:
        got = "a tensor without a gradient"
    else:
        return
    raise OptionError(
        f"{what} must return a differentiable float tensor of shape ({count},), a loss for each sample, got "
        f"{got}; average over all dimensions but the first, as error.flatten(1).mean(1) does"
    )


@WEIGHTINGS.register("none")
def _none(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    return torch.ones_like(level.sigma)


# Both avoid the SNR itself, which is infinite at a flow's clean end.
@WEIGHTINGS.register("min_snr")
def _min_snr(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    signal = level.alpha**2
    return scale * signal / torch.maximum(level.sigma**2, signal / gamma)


@WEIGHTINGS.register("soft_min_snr")
def _soft_min_snr(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    signal = level.alpha**2
    return scale * signal / (level.sigma**2 + signal / gamma)


@WEIGHTINGS.register("debiased")
def _debiased(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    signal = level.alpha**2
    return scale * torch.sqrt(signal / torch.maximum(level.sigma**2, signal / _MOST_SNR))


@WEIGHTINGS.register("p2")
def _p2(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    signal = level.alpha**2
    return scale * signal / (signal + level.sigma**2)


@WEIGHTINGS.register("sigma_sqrt")
def _sigma_sqrt(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    return scale / level.sigma.square().clamp(min=_LEAST_SQUARE)


@WEIGHTINGS.register("cosmap")
def _cosmap(level: NoiseLevel, scale: Tensor, gamma: float) -> Tensor:
    return scale * 2 / (math.pi * (level.alpha**2 + level.sigma**2))


_MOST_SNR = 1000.0
_LEAST_SQUARE = 1e-12


def loss_weights(
    level: NoiseLevel, *, weighting: str, gamma: float, parameterization: str, objective: Objective
) -> Tensor:
    """Factor of each sample's loss, (batch,); weights saturate at the signal-to-noise ratio `gamma`."""
    weights: Tensor = WEIGHTINGS[weighting](level, level_scale(level, parameterization, objective), gamma)
    return weights


def level_scale(level: NoiseLevel, parameterization: str, objective: Objective) -> Tensor:
    """The clean error per error of what `objective` compares, (batch,)."""
    if objective == "x0":
        return torch.ones_like(level.sigma)
    return PARAMETERIZATIONS[parameterization].clean_scale(level)
