"""LoHa: its formula with and without Tucker cores, how it starts, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.loha import LohaAdapter
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> LohaAdapter:
    return LohaAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_the_merged_weight_is_the_formula(case: LayerCase) -> None:
    layer = case.make()
    adapter = fresh(layer)
    randomised(adapter)
    first_a, first_b, second_a, second_b = (p.double() for p in adapter.parameters())
    change = (first_a @ first_b) * (second_a @ second_b)
    expected = layer.weight.double() + (-0.5 * 2.0 / 4) * change.reshape(layer.weight.shape)

    torch.testing.assert_close(adapter.merged(layer.weight, -0.5).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_rank_is_up_to_its_own_square() -> None:
    layer = nn.Linear(40, 30)
    adapter = fresh(layer, rank=3)
    randomised(adapter)
    change = adapter.merged(torch.zeros_like(layer.weight))

    assert torch.linalg.matrix_rank(change) == 9
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 3 * (40 + 30)


@pytest.mark.parametrize(("zero", "empty"), [("up", "hada_w2_a"), ("down", "hada_w1_b")])
def test_it_starts_as_lycoris_does_with_either_factor_at_zero(zero: str, empty: str) -> None:
    adapter = fresh(nn.Linear(300, 400), zero=zero, rank=50)
    stds = {name: p.std().item() for name, p in adapter.named_parameters()}
    narrow = {"up": "hada_w1_a", "down": "hada_w2_a"}[zero]

    assert stds.pop(empty) == 0
    assert stds.pop(narrow) == pytest.approx(0.1, rel=0.02)
    assert all(std == pytest.approx(1, rel=0.02) for std in stds.values())
    assert all(abs(p.mean()) < 0.05 for p in adapter.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(6, 8, (3, 2), stride=2, padding=1), nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2)],
    ids=["2d", "1d", "grouped"],
)
def test_tucker_cores_are_applied_beside_and_merged_alike(layer: nn.Module) -> None:
    inside, kernel = layer.weight.shape[1], layer.weight.shape[2:]
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (3, 8), "hada_w1_b": (3, inside), "hada_w2_a": (3, 8), "hada_w2_b": (3, inside)}
    shapes |= dict.fromkeys(("hada_t1", "hada_t2"), (3, 3, *kernel))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    adapter = LohaAdapter.from_weights(AdapterWeights("loha", tensors, 1.5), FrozenLayer(layer))
    products = [
        torch.einsum("ij...,ip,jr->pr...", tensors[f"hada_t{n}"], tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
    weight = layer.weight + 0.6 * (1.5 / 3) * products[0] * products[1]
    model, x = nn.Sequential(layer), torch.randn(2, 6, *(7,) * len(kernel), generator=generator)

    torch.testing.assert_close(adapter.merged(layer.weight, 0.6), weight, rtol=1e-5, atol=1e-5)
    expected = torch.func.functional_call(model, {"0.weight": weight}, (x,))
    with adapters_attached(model, [Attached({"0": adapter}, 0.6)]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert adapter.to_weights().tensors.keys() == tensors.keys()


def shaped(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    whole = {"w1_a": (12, 2), "w1_b": (2, 8), "w2_a": (12, 2), "w2_b": (2, 8)}
    return {f"hada_{name}": torch.ones(shape) for name, shape in {**whole, **shapes}.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        shaped(w1_a=(11, 2)),
        shaped(w2_b=(2, 9)),
        shaped(w2_a=(12, 3), w2_b=(3, 8)),
        shaped(t1=(2, 2), t2=(2, 2)),
    ],
    ids=["outputs", "inputs", "two ranks", "cores of a linear"],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(
        LoraError, match=r"kind loha with .* does not fit a layer with weight \(12, 8\); it was made for"
    ):
        LohaAdapter.from_weights(AdapterWeights("loha", tensors), FrozenLayer(nn.Linear(8, 12)))


def test_half_an_adapter_is_refused() -> None:
    tensors = shaped(t1=(2, 2))
    with pytest.raises(LoraError, match=r"^an adapter of the kind loha needs .*hada_t2; this one has hada_w1_a"):
        LohaAdapter.from_weights(AdapterWeights("loha", tensors), FrozenLayer(nn.Linear(8, 12)))
