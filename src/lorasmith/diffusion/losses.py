"""Training losses: (batch, ...) prediction and target in fp32 → (batch,) mean per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.choices import LossFunction, Objective
from lorasmith.core.registry import Registry
from lorasmith.diffusion.parameterization import PARAMETERIZATIONS
from lorasmith.diffusion.schedule import NoiseLevel

Elementwise = Callable[[Tensor, Tensor], Tensor]

LOSSES: Registry[Elementwise] = Registry("loss function")
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
    loss_function: LossFunction,
    places: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, shape (batch,), without the weight of its noise level (`weightings`).

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
    distance = LOSSES[loss_function](prediction, target)
    return (distance if places is None else distance * places).flatten(1).mean(1)
