"""LoHa: its formula with and without Tucker cores, how it starts, and tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import randomised
from torch import nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.loha import LohaAdapter


def fresh(layer: nn.Module, *, zero: str = "up", rank: int = 4) -> LohaAdapter:
    return LohaAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=3, path="layer", zero=zero)


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
