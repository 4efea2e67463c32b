"""PiSSA: where it starts, what it saves, and PEFT's numbers on the same weights."""

from __future__ import annotations

import pytest
import torch
from layer_cases import LAYERS, LayerCase, randomised
from torch import nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import PissaAdapter


def fresh(layer: nn.Module, *, rank: int = 3, alpha: float = 2.0) -> PissaAdapter:
    return PissaAdapter.create(FrozenLayer(layer), rank=rank, alpha=alpha, seed=0, path="layer", zero="up")


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_it_starts_from_the_largest_singular_values(case: LayerCase) -> None:
    layer = case.make()
    down, up = (start.flatten(1) for start in fresh(layer).start)
    matrix = layer.weight.detach().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]

    torch.testing.assert_close(2.0 / 3 * up @ down, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-3, atol=1e-4)  # shared evenly
    layer = nn.Linear(300, 200)  # much wider than the rank: by subspace iteration
    down, up = fresh(layer, rank=4, alpha=4.0).start
    values = torch.linalg.svdvals(layer.weight.detach())

    torch.testing.assert_close(torch.linalg.svdvals(up @ down)[:4], values[:4], rtol=5e-3, atol=0)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_what_is_saved_is_a_plain_lora_of_twice_the_rank(case: LayerCase) -> None:
    layer = case.make()
    adapter = fresh(layer)
    randomised(adapter)
    weights = adapter.to_weights()
    plain = LoraAdapter.from_weights(weights, FrozenLayer(layer))

    assert weights.algorithm == "lora"
    assert (plain.rank, plain.alpha, plain.scale) == (6, 4.0, adapter.scale)
    torch.testing.assert_close(plain.merged(layer.weight), adapter.merged(layer.weight))
    # Nothing cancels in it: a bf16 file is as exact as that of any LoRA.
    exact = adapter.merged(layer.weight).detach() - layer.weight.detach()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded = plain.merged(layer.weight).detach() - layer.weight.detach()
    assert (rounded - exact).norm() < 0.01 * exact.norm()
