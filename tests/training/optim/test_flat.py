"""Flat buffers: values kept, gradients summed in fp32, groups by rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasmith.training.optim import flat as flat_module
from lorasmith.training.optim.flat import FlatParameters
from lorasmith.training.optim.optimizers import GatedOptimizer

CPU = torch.device("cpu")


def parameters() -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(3, 5, generator=g)),
        "b": nn.Parameter(torch.randn(7, generator=g)),
        "c": nn.Parameter(torch.randn(2, 2, 3, 3, generator=g)),
    }


@pytest.fixture(params=["cpu", "gpu"])
def as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gradients are added as on a device of this kind."""
    if request.param == "gpu":
        monkeypatch.setattr(flat_module, "_ADDED_BY_AUTOGRAD", ())
    return str(request.param)


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_parameters_keep_values_and_sum_gradients_in_fp32(dtype: torch.dtype) -> None:
    values = parameters()
    before = {name: p.detach().clone() for name, p in values.items()}
    flat = FlatParameters(values, device=CPU, dtype=dtype)
    for _ in range(3):
        sum(p.float().sum() for p in values.values()).backward()
        flat.collect()
    for name, parameter in values.items():
        assert parameter.dtype == dtype
        assert torch.equal(parameter.detach().float(), before[name].to(dtype).float())
        assert torch.equal(flat.view(flat.grad, name), torch.full_like(before[name], 3.0))
    assert flat.grad.sum() == 3 * sum(p.numel() for p in values.values())
    flat.release()
    for name, parameter in values.items():
        assert torch.equal(parameter.detach(), before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_an_interrupted_micro_batch_are_forgotten(as_on: str, dtype: torch.dtype) -> None:
    values = parameters()
    flat = FlatParameters(values, device=CPU, dtype=dtype)
    values["a"].float().sum().backward()
    assert flat._compute_grad.any() == (as_on == "cpu")
    flat.zero()
    values["b"].float().sum().backward()  # the others get none
    flat.collect()
    assert not flat.view(flat.grad, "a").any()
    assert torch.equal(flat.view(flat.grad, "b"), torch.ones(7))


def test_a_gpu_is_not_given_a_sum_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_module, "_ADDED_BY_AUTOGRAD", ())
    monkeypatch.setattr(flat_module, "_SMALL", 15)  # c is larger
    values = parameters()
    flat = FlatParameters(values, device=CPU, dtype=torch.float32)
    leaves = list(values.values())
    expected = torch.autograd.grad(sum(p.square().sum() for p in leaves), leaves)
    sum(p.square().sum() for p in leaves).backward()
    assert [name for name in values if flat.view(flat.grad, name).any()] == ["c"]
    flat.collect()
    assert [name for name in values if values[name].grad is not None] == ["c"]
    assert all(torch.equal(flat.view(flat.grad, name), one) for name, one in zip(values, expected, strict=True))


def test_bf16_training_moves_what_a_bf16_master_would_not() -> None:
    value = {"w": nn.Parameter(torch.ones(64))}
    flat = FlatParameters(value, device=CPU, dtype=torch.bfloat16, rates={"w": 1e-4})
    optimizer = GatedOptimizer("AdamW", flat.groups, weight_decay=0.0)
    flat.grad.fill_(1.0)
    for _ in range(10):
        optimizer.step(torch.tensor(True))
        flat.publish()
    assert flat.view(flat.master, "w")[0].item() == pytest.approx(1 - 1e-3, abs=1e-5)
    assert torch.tensor(1.0).bfloat16() - torch.tensor(1e-4).bfloat16() == 1.0  # what one bf16 step would have done


def test_groups_are_parts_of_the_buffers_with_a_rate_each() -> None:
    values = parameters()
    flat = FlatParameters(values, device=CPU, dtype=torch.float32, rates={"a": 1e-3, "b": 1e-4, "c": 1e-3})
    first, second = flat.groups

    assert (first.rate, second.rate) == (1e-3, 1e-4)
    assert first.flat.numel() + second.flat.numel() == flat.master.numel()
    for name, group in (("a", first.flat), ("b", second.flat), ("c", first.flat)):
        part = flat.view(flat.master, name)
        assert group.data_ptr() <= part.data_ptr() < group.data_ptr() + 4 * group.numel()
        assert part.data_ptr() % 64 == flat.master.data_ptr() % 64
    flat.view(flat.grad, "b").fill_(2.0)
    assert second.flat.grad is not None
    assert second.flat.grad.sum() == 14
    flat = FlatParameters(parameters(), device=CPU, dtype=torch.float32, rates={"a": 1e-3})
    assert [group.flat.numel() % 256 for group in flat.groups] == [0, 0]


def test_views_of_a_group_are_its_parameters_in_the_buffers() -> None:
    values = parameters()
    flat = FlatParameters(values, device=CPU, dtype=torch.bfloat16, rates={"a": 1e-3, "b": 1e-4, "c": 1e-3})
    (a, c), (b,) = (group.views for group in flat.groups)
    for name, leaf in {"a": a, "b": b, "c": c}.items():
        assert leaf.is_leaf
        assert leaf.shape == values[name].shape
        assert leaf.data_ptr() == flat.view(flat.master, name).data_ptr()
        assert leaf.grad is not None
        assert leaf.grad.data_ptr() == flat.view(flat.grad, name).data_ptr()
