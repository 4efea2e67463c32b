"""Flat buffers, gated optimizers, the loss scale, checkpointing's blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasmith.families.model import Model
from lorasmith.training.checkpointing import blocks_at_depth
from lorasmith.training.flat import FlatParameters
from lorasmith.training.mailbox import Mailbox
from lorasmith.training.optimizers import OPTIMIZERS, GatedOptimizer
from lorasmith.training.precision import LossScale

CPU = torch.device("cpu")


def parameters() -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(3, 5, generator=g)),
        "b": nn.Parameter(torch.randn(7, generator=g)),
        "c": nn.Parameter(torch.randn(2, 2, 3, 3, generator=g)),
    }


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


def test_bf16_training_moves_what_a_bf16_master_would_not() -> None:
    value = {"w": nn.Parameter(torch.ones(64))}
    flat = FlatParameters(value, device=CPU, dtype=torch.bfloat16)
    flat.master.grad = flat.grad
    optimizer = GatedOptimizer("AdamW", [(flat.master, 1e-4)], weight_decay=0.0)
    flat.grad.fill_(1.0)
    for _ in range(10):
        optimizer.step(torch.tensor(True))
        flat.publish()
    assert flat.view(flat.master, "w")[0].item() == pytest.approx(1 - 1e-3, abs=1e-5)
    assert torch.tensor(1.0).bfloat16() - torch.tensor(1e-4).bfloat16() == 1.0  # what one bf16 step would have done


def test_groups_are_parts_of_the_buffers_with_a_rate_each() -> None:
    values = parameters()
    flat = FlatParameters(values, device=CPU, dtype=torch.float32, rates={"a": 1e-3, "b": 1e-4, "c": 1e-3})
    (first, fast), (second, slow) = flat.groups

    assert (fast, slow) == (1e-3, 1e-4)
    assert first.numel() + second.numel() == flat.master.numel()
    for name, group in (("a", first), ("b", second), ("c", first)):
        part = flat.view(flat.master, name)
        assert group.data_ptr() <= part.data_ptr() < group.data_ptr() + 4 * group.numel()
        assert part.data_ptr() % 64 == flat.master.data_ptr() % 64
    flat.view(flat.grad, "b").fill_(2.0)
    assert second.grad is not None
    assert second.grad.sum() == 14


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_two_groups_are_two_optimizers(name: str) -> None:
    def run(*groups: tuple[torch.Tensor, float]) -> None:
        for flat, _ in groups:
            flat.grad = torch.full_like(flat, 0.5)
        optimizer = GatedOptimizer(name, groups, weight_decay=0.01)
        for step in range(3):
            for flat, _ in groups:
                flat.grad.fill_(0.5 + step)
            optimizer.step(torch.tensor(step != 1))

    together, apart = (torch.ones(64), torch.ones(32)), (torch.ones(64), torch.ones(32))
    run((together[0], 0.1), (together[1], 0.02))
    for flat, rate in zip(apart, (0.1, 0.02), strict=True):
        run((flat, rate))
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert together[0][0] != together[1][0]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_step_that_may_not_proceed_changes_nothing(name: str) -> None:
    def run(poisoned: bool) -> torch.Tensor:
        flat = torch.ones(64)
        flat.grad = torch.full((64,), 0.5)
        optimizer = GatedOptimizer(name, [(flat, 0.1)], weight_decay=0.01)
        for step in range(4):
            if poisoned:
                flat.grad.fill_(float("nan"))
                optimizer.step(torch.tensor(False))
            flat.grad.fill_(0.5 + step)
            optimizer.step(torch.tensor(True))
        return flat

    assert torch.equal(run(poisoned=False), run(poisoned=True))


def test_the_loss_scale_halves_on_overflow_and_doubles_when_calm() -> None:
    scale = LossScale(CPU, enabled=True)
    first = scale.scale.item()
    scale.update(torch.tensor(False))
    assert scale.scale.item() == first / 2
    for _ in range(500):
        scale.update(torch.tensor(True))
    assert scale.scale.item() == first


def test_a_disabled_loss_scale_is_one() -> None:
    scale = LossScale(CPU, enabled=False)
    scale.update(torch.tensor(False))
    assert scale.scale.item() == 1.0


def test_blocks_by_depth(tiny: Model) -> None:
    unet = tiny.components.denoiser
    names = {id(module): path for path, module in unet.named_modules()}
    depth = {d: [names[id(block)] for block in blocks_at_depth(unet, d)] for d in (1, 2, 3, 5)}
    assert depth[1] == [*(f"down_blocks.{i}" for i in range(3)), *(f"up_blocks.{i}" for i in range(3)), "mid_block"]
    assert "down_blocks.0.resnets.0" in depth[2]
    assert "mid_block.attentions.0" in depth[2]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in depth[3]
    assert depth[5]  # past the nesting there are still blocks
    assert all(list(unet.get_submodule(path).children()) for paths in depth.values() for path in paths)


def test_the_mailbox_delivers_in_order() -> None:
    mailbox = Mailbox(CPU)
    for step in range(3):
        mailbox.post(step, torch.tensor([float(step), 2.0]))
    assert mailbox.collect(wait=True) == [(0, [0.0, 2.0]), (1, [1.0, 2.0]), (2, [2.0, 2.0])]
    assert mailbox.collect() == []
