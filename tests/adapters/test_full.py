"""Full difference: nothing but addition, whatever the precision."""

from __future__ import annotations

import pytest
import torch
from layer_cases import randomised
from torch import nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.full import FullAdapter
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError


def test_the_merged_weight_is_the_sum() -> None:
    layer = nn.Conv2d(4, 6, 3)
    adapter = FullAdapter.create(FrozenLayer(layer), rank=1, alpha=0.0, seed=0, path="", zero="up")
    assert not adapter.diff.any()
    randomised(adapter)

    assert torch.equal(adapter.merged(layer.weight, 0.5), layer.weight + 0.5 * adapter.diff)
    weights = adapter.to_weights()
    assert (weights.algorithm, weights.alpha, list(weights.tensors)) == ("full", None, ["diff"])


def test_a_difference_of_another_shape_is_refused() -> None:
    weights = AdapterWeights("full", {"diff": torch.zeros(4, 6)})
    with pytest.raises(LoraError, match=r"^an adapter of the kind full with diff \(4, 6\) does not fit .* \(6, 4\)"):
        FullAdapter.from_weights(weights, FrozenLayer(nn.Linear(4, 6)))
