from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasmith.core.processes import Processes
from lorasmith.training.optim import flat as flat_module
from lorasmith.training.optim.flat import FlatParameters, GradientSums


class _Two(Processes):
    """Two processes with equal gradients."""

    size = 2

    def __init__(self) -> None:
        self.begun: list[int] = []

    def summing(self, tensor: torch.Tensor):  # type: ignore[no-untyped-def]
        self.begun.append(tensor.numel())
        tensor.mul_(2)
        return lambda: None


def layers() -> tuple[nn.Sequential, FlatParameters]:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    return model, FlatParameters(dict(model.named_parameters()), device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("added_by_autograd", [("cpu",), ()], ids=["as on a CPU", "as on a GPU"])
def test_buckets_are_begun_from_the_last_during_the_backward_pass(
    added_by_autograd: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_module, "_ADDED_BY_AUTOGRAD", added_by_autograd)
    model, flat = layers()
    together = _Two()
    sums = GradientSums(flat, together, bucket_numbers=2048)
    flat.zero()
    with sums.during_backward(norm=True):
        model(torch.ones(1, 32)).sum().backward()
        assert together.begun == [2048, 2048]
    alone = flat.grad / 2
    sums.finish()
    assert together.begun == [2048, 2048]
    assert torch.allclose(sums.own_norm, alone.norm())
    assert torch.equal(
        alone,
        torch.cat([torch.autograd.grad(model(torch.ones(1, 32)).sum(), p)[0].flatten() for p in model.parameters()]),
    )


def test_a_process_without_a_gradient_begins_the_same_buckets() -> None:
    _, flat = layers()
    together = _Two()
    sums = GradientSums(flat, together, bucket_numbers=1024)
    for _ in range(2):
        sums.finish()
    assert together.begun == [1024] * 8
