"""LoRA: its formula, Tucker cores, files that do not fit, and PEFT's numbers on the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LoraAdapter


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> LoraAdapter:
    return LoraAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


@pytest.mark.parametrize("zero", ["up", "down"])
def test_the_other_factor_starts_as_torchs_own_layers_do(zero: str) -> None:
    layer = nn.Linear(300, 400)
    adapter = fresh(layer, zero=zero, rank=100)
    zeroed, filled = (adapter.up, adapter.down) if zero == "up" else (adapter.down, adapter.up)
    bound = 1 / math.sqrt(filled.shape[1])

    assert not zeroed.any()
    assert filled.abs().max() <= bound
    # Of a uniform distribution: the mean is 0 and the standard deviation is the bound over the root of three.
    assert filled.mean().abs() < 0.01 * bound
    assert filled.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_convolutions_have_the_kernel_in_the_down_factor_and_a_linear_keeps_little() -> None:
    conv = fresh(nn.Conv2d(6, 8, (3, 2)))
    assert (conv.down.shape, conv.up.shape) == ((4, 6, 3, 2), (8, 4, 1, 1))
    layer = nn.Linear(48, 40).requires_grad_(False)
    adapter = fresh(layer, rank=2)
    x = torch.randn(5, 48, requires_grad=True)
    saved: list[Tensor] = []
    model = nn.Sequential(layer)
    with (
        adapters_attached(model, [Attached({"0": adapter})]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        model(x)

    assert sorted(tuple(t.shape) for t in saved) == sorted([(5, 48), (5, 2), (2, 48), (40, 2)])
