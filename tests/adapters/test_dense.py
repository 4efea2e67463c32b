"""Products with a change of the weight's size: gradients for every geometry, and small changes in half precision."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, LayerCase
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct, change_alone, changed_product

GEOMETRIES = {
    **LAYERS,
    "padded more on one side": LayerCase(
        lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), (2, 4, 6, 5)
    ),
    "not padded": LayerCase(lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 5)),
}


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("of_weight", "of_input"), [(True, True), (True, False), (False, True)])
def test_a_layers_gradients_are_those_of_autograd(case: LayerCase, of_weight: bool, of_input: bool) -> None:
    layer = FrozenLayer(case.model(torch.float64).get_submodule("layer"))
    x, weight = case.input(torch.float64).requires_grad_(), layer.weight.detach().clone().requires_grad_()
    y = layer.product_with(weight, x, layer.bias)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (weight, x), grad)
    found = layer.product_gradients(grad, weight.detach(), x.detach(), of_weight=of_weight, of_input=of_input)

    for wanted, one, other in zip((of_weight, of_input), found, expected, strict=True):
        assert (one is not None) == wanted
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_changes_and_their_factors_get_the_right_gradients(case: LayerCase) -> None:
    layer = FrozenLayer(case.model(torch.float64).get_submodule("layer"))
    x = case.input(torch.float64).requires_grad_()
    factor = torch.randn(layer.out_features, 1, dtype=torch.float64, requires_grad=True)
    pattern = torch.randn(layer.weight.shape, dtype=torch.float64)

    def build(factor: Tensor) -> Tensor:
        return factor.reshape(-1, *(1,) * (pattern.ndim - 1)) * pattern

    def whole(x: Tensor, factor: Tensor) -> Tensor:
        return changed_product(FrozenProduct(layer, with_bias=True), layer, x, build, factor)

    assert torch.autograd.gradcheck(whole, (x, factor), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, factor: change_alone(layer, x, build, factor), (x, factor), fast_mode=True
    )
    torch.testing.assert_close(whole(x, factor), layer.product_with(layer.weight + build(factor), x, layer.bias))


def test_half_precision_feels_a_change_that_the_weight_could_not_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(1024, 16, bias=False).bfloat16().requires_grad_(False)
    layer.weight.copy_(torch.rand(16, 1024, generator=generator) / 2 + 0.5).mul_(
        torch.randn(16, 1024, generator=generator).sign()
    )
    change = torch.full_like(layer.weight, 2**-10)
    assert torch.equal(layer.weight + change, layer.weight)
    x = torch.ones(1, 1024, dtype=torch.bfloat16)
    plain = FrozenProduct(FrozenLayer(layer), with_bias=True)
    moved = changed_product(plain, FrozenLayer(layer), x, lambda change: change, change) - plain(x)

    assert moved.float().mean() == pytest.approx(1, abs=0.1)  # 1024 · 2⁻¹⁰
