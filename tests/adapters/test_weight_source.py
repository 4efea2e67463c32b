"""Linear-like layers of one's own, and weights that are acquired for a product and released after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable
from lorasmith.adapters.inject import Attached, Rule, adapters_attached, create_adapters, plan_adapters
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, WeightSource, as_stored

ALGORITHMS = ["LoRA", "LoHa", "LoKr", "OFT", "GLoRA", "Full"]


class Borrowed(WeightSource):
    """A weight whose only copy on the device is overwritten as soon as it is released."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self._bias = weight, bias
        self.buffer = torch.full_like(weight, torch.nan)
        self.users = self.uses = 0

    @contextlib.contextmanager
    def use(self) -> Iterator[Packed]:
        self.users, self.uses = self.users + 1, self.uses + 1
        self.buffer.copy_(self.weight)
        yield as_stored(self.buffer, self.buffer.dtype)
        self.users -= 1
        if not self.users:
            self.buffer.fill_(torch.nan)

    def bias(self, layer: nn.Module) -> Tensor:
        return self._bias


class CastLinear(nn.Module):
    """A linear-like layer of another library: no `nn.Linear`, with a product of its own."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, outputs
        self.weight = nn.Parameter(torch.randn(outputs, width))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


def gradients(model: nn.Module, algorithm: str, x: Tensor) -> list[Tensor]:
    plan = plan_adapters(model, [Rule(("*",), linear_only=True)], rank=2, capped=False)
    adapters = create_adapters(model, plan, algorithm=algorithm, alpha=2.0, seed=0, zero="up")
    for adapter in adapters.values():
        for number, parameter in enumerate(adapter.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    trained = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    with adapters_attached(model, [Attached(adapters)]):
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layers_of_ones_own_train_like_linear_ones(algorithm: str) -> None:
    own = nn.Sequential(CastLinear(8, 12), nn.Tanh(), CastLinear(12, 4)).requires_grad_(False)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).requires_grad_(False)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 8, requires_grad=True)
    assert is_targetable(own[0])
    for ours, theirs in zip(gradients(own, algorithm, x), gradients(plain, algorithm, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_weight_is_used_between_acquisition_and_release_alone(algorithm: str) -> None:
    model = nn.Sequential(CastLinear(8, 12), nn.Tanh(), CastLinear(12, 4)).requires_grad_(False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = gradients(model, algorithm, x)
    sources = []
    for layer in (model[0], model[2]):
        sources.append(Borrowed(layer.weight.data.clone(), layer.bias.data.clone()))
        setattr(layer, WEIGHT_SOURCE, sources[-1])
        layer.weight.data.fill_(torch.nan)
        layer.bias.data.fill_(torch.nan)
    for ours, theirs in zip(gradients(model, algorithm, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(source.uses and not source.users for source in sources)
    assert FrozenLayer(model[0]).weight.isfinite().all()


class OwnConv2d(nn.Conv2d):
    """A convolution of another library, which subclasses torch's."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_subclass_of_a_convolution_is_one(algorithm: str) -> None:
    x, found = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1)), []
    for kind in (nn.Conv2d, OwnConv2d):
        torch.manual_seed(0)
        model = nn.Sequential(kind(4, 8, 3, padding=1), nn.SiLU(), kind(8, 4, 1)).requires_grad_(False)
        plan = plan_adapters(model, [Rule(("*",))], rank=2, capped=False)
        adapters = create_adapters(model, plan, algorithm=algorithm, alpha=2.0, seed=0, zero="up")
        with adapters_attached(model, [Attached(adapters)]):
            model(x).square().sum().backward()
        found.append(
            [one.grad for adapter in adapters.values() for one in adapter.parameters() if one.grad is not None]
        )
    assert found[0]
    assert all(map(torch.equal, *found))
