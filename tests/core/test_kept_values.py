"""Copy on write: gradients of networks that change tensors in place are those of the same network out of place."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.kept_values import KeptValues, changes_watched, value_of
from lorasmith.core.recomputation import Recomputing
from lorasmith.training.memory.activations import activations_packed

Change = Callable[[Tensor, Tensor], Any]


def normed(x: Tensor) -> Tensor:
    """Whose gradient needs x."""
    return F.layer_norm(x, x.shape[-1:])


def assigned(x: Tensor, y: Tensor) -> None:
    x[:, 1:3] = y[:, :2] * x[:, 1:3]


def statement(x: Tensor, y: Tensor) -> None:
    x += y


def rows(x: Tensor, y: Tensor) -> None:
    for start in range(0, len(x), 2):
        x[start : start + 2].addcmul_(y[start : start + 2], x[start : start + 2])


CHANGES: dict[str, tuple[Change, Change]] = {
    "add_": (lambda x, y: x.add_(y), lambda x, y: x + y),
    "of itself": (lambda x, y: x.addcmul_(x, y).add_(y), lambda x, y: x + x * y + y),
    "of views of itself": (lambda x, y: x.mul_(y).mul_(x.view_as(x)), lambda x, y: (x * y) * (x * y)),
    "by name": (lambda x, y: x.addcmul_(tensor1=x, tensor2=y), lambda x, y: x + x * y),
    "out": (lambda x, y: torch.add(x, y, out=x), lambda x, y: x + y),
    "out of exp": (lambda x, y: torch.exp(x.mul_(y), out=x), lambda x, y: (x * y).exp()),
    "statement": (statement, lambda x, y: x + y),
    "assignment": (assigned, lambda x, y: torch.cat((x[:, :1], y[:, :2] * x[:, 1:3], x[:, 3:]), 1)),
    "rows": (rows, lambda x, y: x + y * x),
    "a view": (lambda x, y: x.view(-1).mul_(y.view(-1)), lambda x, y: x * y),
    "silu": (lambda x, y: F.silu(x.sub_(y), inplace=True), lambda x, y: F.silu(x - y)),
    "dropout": (lambda x, y: F.dropout(x.add_(y), 0.0, True, True), lambda x, y: x + y),
    "relu_": (lambda x, y: torch.relu_(x.add_(y)), lambda x, y: (x + y).relu()),
    "an operator": (lambda x, y: torch.ops.aten.addcmul_(x, x, y), lambda x, y: x + x * y),
    "an overload": (lambda x, y: torch.ops.aten.mul_.Tensor(self=x, other=y), lambda x, y: x * y),
    "several": (lambda x, y: torch._foreach_mul_([x], [y]), lambda x, y: x * y),
}


class Network(nn.Module):
    """Blocks whose inputs and results a change makes another of, in place or not."""

    def __init__(self, change: Change, *, in_place: bool) -> None:
        super().__init__()
        self.change, self.in_place = change, in_place
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.calls = [functools.partial(self.block, layer) for layer in self.layers]

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(normed(x))
        changed = self.change(x, y)
        return x if self.in_place else changed

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda call, *given: call(*given)) -> Tensor:
        x = self.layers[0](x)
        for call in self.calls:
            x = run(call, x)
        return normed(x)


def gradients(change: Change, how: str, *, in_place: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    net = Network(change, in_place=in_place)
    x = torch.rand(4, 6, dtype=torch.float64) + 0.5
    kind: Any = how if how in ("lean", "selective", "host") else "keep"
    found: list[Tensor] = []
    recomputing = Recomputing()
    for _ in range(2 if how == "recomputed" else 1):
        with activations_packed(kind, net, watched=True):
            y = net(x, recomputing.run) if how == "recomputed" else net(x)
        found = list(torch.autograd.grad(y[..., 0].square().sum(), tuple(net.parameters())))
    return [y.detach(), *found]


def test_changes_in_place_have_the_gradients_of_changes_out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for how in ["keep", "lean", "selective", "host", "recomputed"]:
        for name in CHANGES:
            from lorasmith.training.memory import activations

            monkeypatch.setattr(activations, "_SMALL", 1)  # so that recipes are written
            monkeypatch.setattr(activations, "_WORTH_MOVING", 1)
            in_place, out_of_place = CHANGES[name]
            expected = gradients(out_of_place, "plain", in_place=False)
            found = gradients(in_place, how)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_is_kept_is_copied_once_and_only_if_it_changes() -> None:
    values = KeptValues()
    x, other = torch.arange(8.0), torch.ones(4)
    whole, part, apart = values.keep(x), values.keep(x.view(2, 4)[1]), values.keep(other)
    gone = values.keep(torch.ones(3))
    del gone
    gc.collect()
    with changes_watched(values):
        assert value_of(whole) is x
        x[:2] = 9
        x.mul_(0)
    assert value_of(whole).tolist() == [*range(8)]
    assert value_of(part).tolist() == [4, 5, 6, 7]
    assert value_of(whole).untyped_storage()._cdata == value_of(part).untyped_storage()._cdata
    assert value_of(apart) is other
    with changes_watched(values):  # as the second run of a block changes what the first has left
        value_of(whole).zero_()
    assert value_of(part).tolist() == [4, 5, 6, 7]


def test_a_change_outside_is_noticed() -> None:
    values, x = KeptValues(), torch.ones(3)
    kept = values.keep(x)
    x.add_(1)
    with pytest.raises(AssertionError, match="in place"):
        value_of(kept)


def test_aliases_see_a_change() -> None:
    with changes_watched(KeptValues()):
        x = torch.ones(2, requires_grad=True) * 2
        alias, part = x, x[:1]
        x += 1
        (only,) = x.chunk(1)
        other = only
        only *= 2  # which autograd forbids in place
        assert other is not only and only.tolist() == [6, 6]
    assert alias is x
    assert part.tolist() == [3]


def test_functions_of_torch_are_its_own_again() -> None:
    places = (torch.Tensor, torch, torch._C._nn, torch._VF, F, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    before = [dict(vars(place)) for place in places]
    with pytest.raises(ZeroDivisionError), changes_watched(KeptValues()), changes_watched(KeptValues()):
        raise ZeroDivisionError
    assert [dict(vars(place)) for place in places] == before
