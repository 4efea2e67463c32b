"""The loss scale of fp16: when it halves, when it doubles."""

from __future__ import annotations

import torch

from lorasmith.training.optim.optimizers import LossScale

CPU = torch.device("cpu")


def test_the_loss_scale_halves_on_overflow_and_doubles_when_calm() -> None:
    scale = LossScale(CPU, enabled=True)
    first = scale.scale.item()
    scale.update(torch.tensor(False))
    assert scale.scale.item() == first / 2
    for _ in range(500):
        scale.update(torch.tensor(True))
    assert scale.scale.item() == first


def test_a_disabled_loss_scale_is_one() -> None:
    scale = LossScale(CPU, enabled=False)
    scale.update(torch.tensor(False))
    assert scale.scale.item() == 1.0
