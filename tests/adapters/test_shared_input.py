"""Layers that share an input are computed together: the same function, fewer products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters import inject, lora
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.frozen_weights import products_enabled, weights_packed
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import RankMasks
from lorasmith.core import quantized_products
from lorasmith.core.kernels import Kernel


class Attention(nn.Module):
    """Names and order of calls as in diffusers' attention."""

    def __init__(self, width: int, text_width: int | None = None) -> None:
        super().__init__()
        self.is_cross_attention = text_width is not None
        self.to_q = nn.Linear(width, 24, bias=False)
        self.to_k = nn.Linear(text_width or width, 24)
        self.to_v = nn.Linear(text_width or width, 16)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


def adapters_of(net: Attention, ranks: tuple[int, ...] = (4, 2, 6)) -> dict[str, LoraAdapter]:
    g = torch.Generator().manual_seed(3)
    found = {}
    for rank, (name, layer) in zip(ranks, net.named_children(), strict=True):
        adapter = LoraAdapter.create(FrozenLayer(layer), rank=rank, alpha=2.0, seed=0, path=name, zero="up")
        adapter.up.data = torch.randn(adapter.up.shape, generator=g)
        found[name] = adapter
    return found


def outcome(net: Attention, adapters: dict[str, Any], *inputs: Tensor) -> list[Tensor]:
    """Output, gradient of each input and of each matrix."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    parameters = [p for one in adapters.values() for p in one.parameters()]
    with adapters_attached(net, [Attached(adapters, strength=0.7)]):
        y = net(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *parameters])]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups that were computed together."""
    seen: list[int] = []
    original: Callable[..., Any] = inject.linear_with_lora

    def counted(x: Tensor, layers: Any, *rest: Any) -> Any:
        seen.append(len(layers))
        return original(x, layers, *rest)

    monkeypatch.setattr(inject, "linear_with_lora", counted)
    return seen


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject, "_share_inputs", lambda *_: None)


@pytest.mark.parametrize("text", [None, 20, 32])  # with 32 in, keys and values could be taken for siblings of the query
def test_together_is_apart(text: int | None, groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Attention(32, text).requires_grad_(False)
    adapters = adapters_of(net)
    inputs = [torch.randn(2, 5, 32), *([] if text is None else [torch.randn(2, 7, text)])]
    together = outcome(net, adapters, *inputs)
    assert groups == [3] if text is None else groups == [2]
    apart(monkeypatch)
    for found, expected in zip(together, outcome(net, adapters, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_turn_out_to_have_other_inputs_are_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Attention(32, 32).requires_grad_(False)
    net.is_cross_attention = False  # nothing says that k and v see something else
    adapters, inputs = adapters_of(net), (torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    together = outcome(net, adapters, *inputs)
    apart(monkeypatch)
    for found, expected in zip(together, outcome(net, adapters, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("is_apart", [False, True])
def test_frozen_products_that_add_to_narrow_ones_give_the_same(
    kind: Any, is_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: with biases and without, of one adapter and of two on a layer."""
    torch.manual_seed(0)
    net, x = Attention(32).requires_grad_(False), torch.randn(2, 5, 32)
    if is_apart:
        apart(monkeypatch)
    attached = [Attached(adapters_of(net), strength=0.7), Attached(adapters_of(net, (2, 2, 2)))]

    def found() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with adapters_attached(net, attached):
            y = net(leaf)
        parameters = [p for one in attached for adapter in one.adapters.values() for p in adapter.parameters()]
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]

    with ExitStack() as stack:
        if kind is not None:
            stack.enter_context(weights_packed(net, kind=kind, device=x.device, dtype=x.dtype))
        expected = found()
        monkeypatch.setattr(lora, "_adds_to_narrow", lambda _: True)
        monkeypatch.setattr(FrozenLayer, "times", None)
        for one, other in zip(found(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("ranks", [((4, 2, 6),), ((4, 2, 6), (2, 2, 2))], ids=["one adapter", "two"])
def test_quantized_products_that_add_narrow_ones_give_the_same(
    is_apart: bool, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the kernel of a GPU, which writes each result once."""
    torch.manual_seed(0)
    net, x = Attention(32), torch.randn(2, 5, 32)
    net.to_q, net.to_k = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)  # sizes that have such products
    net.requires_grad_(False)
    if is_apart:
        apart(monkeypatch)
    attached = [Attached(adapters_of(net, each), strength=0.7) for each in ranks]
    added = Counter[str]()

    def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: Any, bias: Any, *more: Any) -> Tensor:
        y = (a.float() @ b.float()) * scale_a * scale_b
        y = y if bias is None else y + bias
        narrow, total = (*more, None, None)[:2]
        if narrow is not None:
            added["narrow"] += 1
            y = y + narrow.factor * narrow.part @ narrow.second
        if total is None:
            return y
        added["total"] += 1
        return total.add_(y)

    def found() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with adapters_attached(net, attached):
            y = net(leaf)
        parameters = [p for one in attached for adapter in one.adapters.values() for p in adapter.parameters()]
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]

    monkeypatch.setattr(quantized_products, "int8_product_on", lambda _: Kernel("", product))
    with weights_packed(net, kind="int8", device=x.device, dtype=x.dtype), products_enabled(net, "int8", x.device):
        expected = found()
        assert not added
        monkeypatch.setattr(lora, "_adds_to_narrow", lambda _: True)
        for layer in net.children():
            layer.products.adds_narrow = True  # type: ignore[union-attr]
        for one, other in zip(found(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    together = not is_apart and len(ranks) == 1
    assert added["narrow"] == 3 + (1 if together else 3)
    assert added["total"] == (2 if together else 0)


def test_dropout_computes_them_apart(groups: list[int]) -> None:
    net = Attention(32).requires_grad_(False)
    adapters = adapters_of(net)
    dropout = RankMasks(adapters, rank_dropout=0.5, module_dropout=0.0, seed=0, schedule=None)
    with dropout.masks_applied(dropout.masks([0, 1], torch.zeros(2))), adapters_attached(net, [Attached(adapters)]):
        dropped = net(torch.ones(2, 5, 32))
    assert not groups
    with adapters_attached(net, [Attached(adapters)]):
        whole = net(torch.ones(2, 5, 32))
    assert groups == [3]
    assert not torch.allclose(dropped, whole)


def test_nothing_stays_behind(groups: list[int]) -> None:
    net = Attention(32).requires_grad_(False)
    adapters = adapters_of(net)
    with adapters_attached(net, [Attached(adapters)]):
        shared, index = net.to_q.forward.__self__.shared
        x = torch.randn(2, 5, 32)
        net(x)
        assert shared._x is None
        assert not shared._results
        assert torch.equal(shared(index, x), net.to_q(x))  # asked alone, it answers as well
    assert groups == [3, 3, 3][: len(groups)]
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_further_adapter_on_one_of_them_parts_them(groups: list[int]) -> None:
    net = Attention(32).requires_grad_(False)
    adapters = adapters_of(net)
    x = torch.randn(1, 3, 32)
    with adapters_attached(net, [Attached(adapters)]):
        with adapters_attached(net, [Attached({"to_q": adapters["to_q"]})]):
            net(x)
        assert not groups
        net(x)
    assert groups == [3]
