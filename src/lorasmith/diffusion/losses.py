"""Training losses, and the weights of noise levels in them.

Losses map (batch, ...) prediction and target in fp32 to the (batch,) mean per sample. Weights are pure functions of the
level, the kind of prediction and gamma, defined for the squared error of the clean sample, as in the papers. `scale`
converts them to the objective: the clean error per error of the prediction, 1 if clean samples are compared. With MSE a
weighted run is therefore the same for both objectives, except with `none`.

    min_snr        min(SNR, gamma)                (Hang et al. 2023, arXiv:2303.09556)
    soft_min_snr   SNR · gamma / (SNR + gamma)    (Crowson et al. 2024, arXiv:2401.11605, with sigma_data² = 1/gamma)

SNR is alpha²/sigma². On predictions, min_snr is the familiar min(SNR, gamma)/SNR of epsilon and min(SNR, gamma)/(SNR+1)
of v; of a flow it is min(alpha², gamma · sigma²), most where alpha = √gamma · sigma and none at both ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.choices import LOSSES, WEIGHTINGS, Objective
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, NoiseLevel

LOSSES.register("MSE")(lambda prediction, target: F.mse_loss(prediction, target, reduction="none"))
LOSSES.register("L1")(lambda prediction, target: F.l1_loss(prediction, target, reduction="none"))
LOSSES.register("Huber")(lambda prediction, target: F.huber_loss(prediction, target, reduction="none"))
LOSSES.register("SmoothL1")(lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"))


def diffusion_loss(
    prediction: Tensor,
    *,
    clean: Tensor,
    noise: Tensor,
    noised: Tensor,
    level: NoiseLevel,
    parameterization: str,
    objective: Objective,
    loss_function: str,
    places: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, shape (batch,), without the weight of its noise level (`loss_weights`).

    With MSE the `x0` objective (as in ComfyUI's trainer) equals the native one times sigma²/alpha² (epsilon) or sigma²
    (v and flow). `prediction` (batch, ...) is of any float dtype; `clean`, `noise`, `noised` are fp32 of that shape.
    `places` are fp32 weights that broadcast to it; a place of weight 0 has no gradient.
    """
    kind = PARAMETERIZATIONS[parameterization]
    prediction = prediction.float()
    if objective == "x0":
        prediction, target = kind.clean(prediction, noised, level), clean
    else:
        target = kind.target(clean, noise, level)
    distance: Tensor = LOSSES[loss_function](prediction, target)
    return (distance if places is None else distance * places).flatten(1).mean(1)


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


def loss_weights(
    level: NoiseLevel, *, weighting: str, gamma: float, parameterization: str, objective: Objective
) -> Tensor:
    """Factor of each sample's loss, (batch,); weights saturate at the signal-to-noise ratio `gamma`."""
    compares_clean = objective == "x0"
    scale = torch.ones_like(level.sigma) if compares_clean else PARAMETERIZATIONS[parameterization].clean_scale(level)
    weights: Tensor = WEIGHTINGS[weighting](level, scale, gamma)
    return weights
