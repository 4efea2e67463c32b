"""Blocks that run again in the backward pass: the numbers of torch's own checkpointing, with less to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.lora import LowRankTerm, RunTerms, linear_with_lora
from lorasmith.core.recomputation import Recomputing, _is_linear, constant_kept, recomputed

_WIDTH = 32


class Layer(nn.Module):
    """A frozen Linear layer with a LoRA; `products` counts those with the frozen weight in forward passes."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, _WIDTH) / 8)
        self.up = nn.Parameter(torch.randn(_WIDTH, rank) / 8)
        self.frozen = FrozenLayer(nn.Linear(_WIDTH, _WIDTH).requires_grad_(False))
        self.products = 0

    def forward(self, x: Tensor) -> Tensor:
        def times(x: Tensor, bias: Tensor | None, shared: dict[object, Any]) -> Tensor:
            self.products += 1
            return own(x, bias, shared)

        own = self.frozen.times
        with mock.patch.object(self.frozen, "times", times):
            terms = RunTerms((LowRankTerm(0, 0.5, self.down, self.up, None),))
            return linear_with_lora(x, (self.frozen,), (self.frozen.bias,), (terms,))[0]


class Block(nn.Module):
    """`x + gate · last(tanh(first(x)))`, with a gate of another input, which needs no gradient."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.first, self.last = Layer(rank), Layer(rank)
        self.modulation = nn.Linear(_WIDTH, _WIDTH).requires_grad_(False)
        self.runs = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.runs += 1
        gate = self.gate(time)
        return x + gate[:, None] * self.last(torch.tanh(self.first(x)))

    def gate(self, time: Tensor) -> Tensor:
        return constant_kept(self.modulation.forward, time)


def gradients(blocks: Sequence[Block], call: Callable[..., Tensor]) -> list[Tensor]:
    """Of a loss of several blocks, to the input and the adapters."""
    torch.manual_seed(1)
    x, time = torch.randn(2, 40, _WIDTH, requires_grad=True), torch.randn(2, _WIDTH)
    y = x
    for block in blocks:
        y = call(block, y, time)
    wanted = [x, *(one for block in blocks for one in block.parameters() if one.requires_grad)]
    return list(torch.autograd.grad(y.square().sum(), wanted))


def of_torch(block: Block, *args: Tensor) -> Tensor:
    result: Tensor = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
    return result


def run_by(recomputing: Recomputing, blocks: Sequence[Block]) -> Callable[..., Tensor]:
    """A call of one of the blocks."""
    forwards = {block: block.forward for block in blocks}

    def run(block: Block, *args: Tensor) -> Tensor:
        result: Tensor = recomputing.run(forwards[block], *args)
        return result

    return run


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(3)]


@pytest.mark.parametrize("rank", [1, 16])  # whose products are kept, and too large for that
def test_the_numbers_are_those_of_torchs_own(rank: int) -> None:
    torch.manual_seed(0)
    blocks = [Block(rank) for _ in range(3)]
    ours, theirs, plain = (
        gradients(blocks, call) for call in (recomputed, of_torch, lambda block, *args: block(*args))
    )
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, ours, plain))


def test_the_last_product_runs_once_and_others_twice(blocks: list[Block]) -> None:
    gradients(blocks, recomputed)
    assert [(one.runs, one.first.products, one.last.products) for one in blocks] == 3 * [(2, 2, 1)]


def test_a_product_that_is_needed_runs_twice(blocks: list[Block]) -> None:
    """The square of the result is saved within the block."""
    gradients(blocks, lambda block, *args: recomputed(lambda *args: block(*args).square().sqrt(), *args))
    assert [one.last.products for one in blocks] == 3 * [2]


def test_small_results_are_kept(blocks: list[Block]) -> None:
    with mock.patch.object(torch.nn.functional, "linear", side_effect=torch.nn.functional.linear) as linear:
        gradients(blocks[:1], recomputed)
    assert linear.call_count == 3 + 3  # with the frozen weights, and in the first run alone: the gate and low-rank ones


def test_what_was_modified_is_not_kept(blocks: list[Block]) -> None:
    def doubled(self: Block, time: Tensor) -> Tensor:
        return constant_kept(self.modulation.forward, time).mul_(2)

    with mock.patch.object(Block, "gate", doubled):
        ours, plain = (gradients(blocks, call) for call in (recomputed, lambda block, *args: block(*args)))
    assert all(map(torch.equal, ours, plain))


def test_all_blocks_but_the_last_run_twice(blocks: list[Block]) -> None:
    """From the second pass on, when it is known which is the last."""
    run = run_by(Recomputing(), blocks)
    plain = gradients(blocks, lambda block, *args: block(*args))
    for wanted in ([2, 2, 2], [2, 2, 1], [2, 2, 1]):
        for block in blocks:
            block.runs = 0
        assert all(map(torch.equal, gradients(blocks, run), plain))
        assert [block.runs for block in blocks] == wanted
    gradients(blocks[:2], run)  # the order may change
    for block in blocks:
        block.runs = 0
    gradients(blocks[:2], run)
    assert [block.runs for block in blocks] == [2, 1, 0]
    with torch.no_grad():
        run(blocks[0], torch.ones(1, 1, _WIDTH), torch.ones(1, _WIDTH))
    assert [block.runs for block in blocks] == [3, 1, 0]


@pytest.mark.parametrize(("kept", "runs"), [(2, [2, 1, 1]), (3, [1, 1, 1]), (9, [1, 1, 1])])
def test_more_of_the_last_blocks_may_run_once(blocks: list[Block], kept: int, runs: list[int]) -> None:
    run = run_by(Recomputing(kept), blocks)
    plain = gradients(blocks, lambda block, *args: block(*args))
    gradients(blocks, run)
    for block in blocks:
        block.runs = 0
    assert all(map(torch.equal, gradients(blocks, run), plain))
    assert [block.runs for block in blocks] == runs


def test_a_graph_may_be_used_twice(blocks: list[Block]) -> None:
    x, time = torch.randn(2, 40, _WIDTH, requires_grad=True), torch.randn(2, _WIDTH)
    loss = recomputed(blocks[0], x, time=time).square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_block_that_does_not_do_the_same_again_is_found() -> None:
    runs = iter([torch.exp, torch.neg])

    def block(x: Tensor) -> Tensor:
        return next(runs)(x)

    y = recomputed(block, torch.ones(2, requires_grad=True))
    with pytest.raises(AssertionError, match="saves less in its second run"):
        y.sum().backward()


_X = torch.randn(2, 3, 4, requires_grad=True)
_LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + 1,
    "subtract": lambda x: x - x.flip(0),
    "scale": lambda x: x * torch.ones(4),
    "number": lambda x: 2 * x,
    "cast": lambda x: x.to(torch.bfloat16),
    "view": lambda x: x.view(6, 4),
    "transpose": lambda x: x.transpose(0, 1),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "unbind": lambda x: x.unbind(0)[0],
    "slice": lambda x: x[:, 1:],
    "concatenation": lambda x: torch.cat([x, x]),
    "squeeze": lambda x: x[:, :, :1].squeeze(-1),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1),
    "clone": lambda x: x.permute(2, 0, 1).contiguous(),
}
_OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "square": lambda x: x * x,
    "activation": torch.nn.functional.gelu,
    "norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "clamp": lambda x: x.clamp(-1, 1),
}


@pytest.mark.parametrize("name", _LINEAR)
def test_functions_that_save_nothing_of_their_input(name: str) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        y = _LINEAR[name](_X)
    assert _is_linear(y.grad_fn)
    assert not any(one.requires_grad for one in saved)


def test_functions_that_may_save_their_input() -> None:
    for name in _OTHERS:
        assert not _is_linear(_OTHERS[name](_X).grad_fn)
