from __future__ import annotations

import torch
from torch import nn

from lorasmith.families.files.empty_weights import weights_empty


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("steps", torch.arange(3).float().fill_(2.0))
        nn.init.normal_(self.linear.weight)
        self.linear.bias.data.zero_()


def test_parameters_are_empty_and_buffers_are_not() -> None:
    state = torch.get_rng_state()
    with weights_empty():
        layer = Layer()
    assert all(parameter.is_meta and parameter.requires_grad for parameter in layer.parameters())
    assert layer.get_buffer("steps").tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_nothing_is_skipped() -> None:
    with weights_empty():
        Layer()
    assert Layer().linear.weight.std() > 0.1
