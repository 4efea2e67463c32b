from __future__ import annotations

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import cast_weights, packed_layers


def test_weights_are_cast_in_place_without_scales() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Conv2d(4, 2, 1)).half()
    weights = [model[0].weight.data.clone(), model[2].weight.data.clone()]
    cast_weights(model, torch.float8_e5m2)
    first = packed_layers(model)
    assert list(first) == ["0", "2"]
    for source, weight in zip(first.values(), weights, strict=True):
        assert source.tensors[0].dtype == torch.float8_e5m2
        assert torch.equal(source.weight(), weight.to(torch.float8_e5m2).half())
    cast_weights(model, torch.float8_e4m3fn)  # packed ones stay as they are
    assert packed_layers(model) == first
    assert model[1].weight.dtype == torch.float16
