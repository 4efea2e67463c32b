from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from lorasmith.families.files.original_weights import weights_empty


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


def test_other_threads_keep_their_weights() -> None:
    """Two threads that enter and leave in any order do not disturb each other, nor a third."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        inside, outside = weights_empty(), weights_empty()
        one.submit(inside.__enter__).result()
        other.submit(outside.__enter__).result()
        assert not Layer().linear.weight.is_meta
        one.submit(inside.__exit__, None, None, None).result()
        assert other.submit(Layer).result().linear.weight.is_meta
        other.submit(outside.__exit__, None, None, None).result()
        assert not any(pool.submit(Layer).result().linear.weight.is_meta for pool in (one, other))
