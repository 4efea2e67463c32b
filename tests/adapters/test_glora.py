"""GLoRA: its formula, Tucker cores, the older order of its matrices, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.glora import GloraAdapter
from lorasmith.core.adapter_state import AdapterWeights


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> GloraAdapter:
    return GloraAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


@pytest.mark.parametrize(("zero", "empty"), [("up", ("a1", "b1")), ("down", ("a2", "b2"))])
def test_one_matrix_of_each_pair_starts_at_zero(zero: str, empty: tuple[str, str]) -> None:
    adapter = fresh(nn.Linear(300, 400), zero=zero, rank=20)
    for name, parameter in adapter.named_parameters():
        assert parameter.abs().max() <= parameter.shape[1] ** -0.5
        assert bool(parameter.any()) == (name not in empty)


def randoms(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_pairs_may_be_the_other_way_round_and_kernels_flat_in_files() -> None:
    layer = nn.Linear(6, 8)
    new = randoms(a1=(6, 2), a2=(2, 6), b1=(8, 2), b2=(2, 6))
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]}
    read = [GloraAdapter.from_weights(AdapterWeights("glora", one, 1.0), FrozenLayer(layer)) for one in (new, old)]
    assert torch.equal(*(one.merged(layer.weight) for one in read))
    tensors = randoms(a1=(6, 2, 1, 1), a2=(2, 6), b1=(8, 2), b2=(2, 54))
    conv = GloraAdapter.from_weights(AdapterWeights("glora", tensors), FrozenLayer(nn.Conv2d(6, 8, 3))).to_weights()
    shapes = {"a1": (6, 2, 1, 1), "a2": (2, 6, 1, 1), "b1": (8, 2, 1, 1), "b2": (2, 6, 3, 3)}
    assert {name: tuple(tensor.shape) for name, tensor in conv.tensors.items()} == shapes
    assert conv.alpha == 2
