"""GLoRA: its formula, Tucker cores, the older order of its matrices, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.glora import GloraAdapter
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> GloraAdapter:
    return GloraAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_the_merged_weight_is_the_formula(case: LayerCase) -> None:
    layer = case.make()
    adapter = fresh(layer)
    randomised(adapter)
    a1, a2, b1, b2 = (p.detach().double().flatten(1) for p in (adapter.a1, adapter.a2, adapter.b1, adapter.b2))
    weight = layer.weight.detach().double()
    inputs = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    expected = weight + (-0.5 * 2.0 / 4) * (inputs + (b1 @ b2).reshape(weight.shape))

    torch.testing.assert_close(adapter.merged(layer.weight, -0.5).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("zero", "empty"), [("up", ("a1", "b1")), ("down", ("a2", "b2"))])
def test_one_matrix_of_each_pair_starts_at_zero(zero: str, empty: tuple[str, str]) -> None:
    adapter = fresh(nn.Linear(300, 400), zero=zero, rank=20)
    for name, parameter in adapter.named_parameters():
        assert parameter.abs().max() <= parameter.shape[1] ** -0.5
        assert bool(parameter.any()) == (name not in empty)


def test_parameters() -> None:
    assert sum(p.numel() for p in fresh(nn.Linear(30, 20), rank=3).parameters()) == 3 * (3 * 30 + 20)


def randoms(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_tucker_core_is_applied_beside_and_merged_alike(groups: int) -> None:
    layer = nn.Conv2d(6 * groups, 8, 3, stride=2, padding=1, groups=groups)
    tensors = randoms(a1=(6, 2), a2=(2, 6), b1=(8, 2), b2=(2, 6), bm=(2, 2, 3, 3))
    adapter = GloraAdapter.from_weights(AdapterWeights("glora", tensors, 1.0), FrozenLayer(layer))
    inputs = torch.einsum("oixy,ij->ojxy", layer.weight, tensors["a1"] @ tensors["a2"])
    added = torch.einsum("om,mnxy,ni->oixy", tensors["b1"], tensors["bm"], tensors["b2"])
    weight = layer.weight + 0.6 * 0.5 * (inputs + added)
    model, x = nn.Sequential(layer), torch.randn(2, 6 * groups, 7, 7)

    torch.testing.assert_close(adapter.merged(layer.weight, 0.6), weight, rtol=1e-5, atol=1e-5)
    expected = torch.func.functional_call(model, {"0.weight": weight}, (x,))
    with adapters_attached(model, [Attached({"0": adapter}, 0.6)]):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_files_of_old_have_each_pair_the_other_way_round() -> None:
    layer = nn.Linear(6, 8)
    new = randoms(a1=(6, 2), a2=(2, 6), b1=(8, 2), b2=(2, 6))
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]}
    merged = [
        GloraAdapter.from_weights(AdapterWeights("glora", tensors, 1.0), FrozenLayer(layer)).merged(layer.weight)
        for tensors in (new, old)
    ]

    assert torch.equal(*merged)


def test_kernels_may_be_flat_in_files() -> None:
    layer = nn.Conv2d(6, 8, 3)
    tensors = randoms(a1=(6, 2, 1, 1), a2=(2, 6), b1=(8, 2), b2=(2, 54))
    weights = GloraAdapter.from_weights(AdapterWeights("glora", tensors), FrozenLayer(layer)).to_weights()

    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == {
        "a1": (6, 2, 1, 1),
        "a2": (2, 6, 1, 1),
        "b1": (8, 2, 1, 1),
        "b2": (2, 6, 3, 3),
    }
    assert weights.alpha == 2


@pytest.mark.parametrize(
    "shapes",
    [
        {"a1": (5, 2)},
        {"b1": (7, 2)},
        {"a1": (6, 3), "a2": (3, 6)},
        {"b2": (2, 7)},
        {"bm": (2, 2, 3, 3)},
    ],
    ids=["inputs", "outputs", "two ranks", "inputs of b", "core of a linear"],
)
def test_tensors_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = randoms(**{"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6), **shapes})
    with pytest.raises(LoraError, match=r"kind glora with .* does not fit a layer with weight \(8, 6\); it was made"):
        GloraAdapter.from_weights(AdapterWeights("glora", tensors), FrozenLayer(nn.Linear(6, 8)))
