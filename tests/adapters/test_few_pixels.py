"""Convolutions as matrix products: the same function, where it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters import frozen_layer
from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_layer, "_WEIGHTS_PER_PIXEL", 0)


def outcome(layer: nn.Conv2d, x: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    y = FrozenProduct(FrozenLayer(layer), with_bias=True)(x) if frozen else layer(x)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    return y, grad


@pytest.mark.pairwise(
    kernel=[1, 3, (3, 5)],
    stride=[1, 2, (1, 3)],
    padding=[0, 1, (2, 0)],
    bias=[False, True],
    dtype=[torch.float32, torch.bfloat16],
)
def test_it_is_the_convolution(kernel: int, stride: int, padding: int, bias: bool, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, kernel, stride, padding, bias=bias).to(dtype, memory_format=torch.channels_last)
    layer.requires_grad_(False)
    x = torch.randn(2, 6, 7, 8, dtype=dtype)
    assert frozen_layer.has_few_pixels(layer, x.shape, layer.weight)
    for found, expected in zip(outcome(layer, x, frozen=True), outcome(layer, x, frozen=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.dtype == dtype


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Conv2d(6, 4, 3, dilation=2),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv1d(6, 4, 3),
        nn.Linear(6, 4),
    ],
)
def test_others_stay_convolutions(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    if weight.ndim == 4:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    assert not frozen_layer.has_few_pixels(layer, torch.Size((1, 6, 8, 8)[: weight.ndim]), weight)


def test_only_large_weights_on_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    large = nn.Conv2d(1280, 640, 3, padding=1).to(memory_format=torch.channels_last)
    assert frozen_layer.has_few_pixels(large, torch.Size((1, 1280, 8, 8)), large.weight)
    assert not frozen_layer.has_few_pixels(large, torch.Size((1, 1280, 32, 32)), large.weight)
    assert not frozen_layer.has_few_pixels(large, torch.Size((4, 1280, 8, 8)), large.weight)
