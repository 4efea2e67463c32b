"""Adapters of several runs on one layer: each sample has what it has in a batch of its run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer, weight_source_set
from lorasmith.adapters.inject import Attached, Difference, adapters_attached
from lorasmith.adapters.joint_adapters import SampleRows, SamplesMixed, jointly_attached
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import InputDora, OutputDora
from lorasmith.core.quantization import packed
from tests.covering import slow_except

COUNTS = (2, 1, 3)
NAMES = [name for name, _ in ADAPTERS.items()]


class Attention(nn.Module):
    """Layers with one input, a norm on one of them, and a convolution."""

    is_cross_attention = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=index > 0) for index in range(3))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.to_q(x) * self.norm(self.to_k(x)) + self.to_v(x)


class TokensFirst(nn.Module):
    """A layer that has the samples in its second dimension, and `to_out` with all tokens in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.to_out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 16).transpose(0, 1)).transpose(0, 1)
        return self.to_out(x.reshape(-1, 16)).view(x.shape)


def adapter(name: str, layer: nn.Module, seed: int) -> Adapter:
    kind = {"input DoRA": InputDora, "output DoRA": OutputDora}.get(name)
    frozen = FrozenLayer(layer)
    options = {"rank": 4, "alpha": 2.0, "seed": seed, "path": "layer", "zero": "up"}
    if kind is not None:
        one: Adapter = kind.around(LoraAdapter.create(frozen, **options), frozen)  # type: ignore[arg-type]
    else:
        one = ADAPTERS[name].create(frozen, **options)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    for parameter in one.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=g)
    return one


def on(model: nn.Module, name: str, seed: int, *, only: Sequence[str] = (), norms: bool = False) -> Attached:
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and (not only or path in only)
    }
    differences = {"norm": Difference({"weight": torch.full((16,), 0.1 * seed)})} if norms else {}
    return Attached({path: adapter(name, layer, seed) for path, layer in layers.items()}, differences=differences)


def parameters(one: Attached) -> list[nn.Parameter]:
    return [p for part in (*one.adapters.values(), *one.differences.values()) for p in part.parameters()]


def computed(model: nn.Module, x: Tensor, runs: Sequence[Attached]) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for one in runs for p in parameters(one))]
    return y.detach(), list(torch.autograd.grad((y * y).sum(), wanted))


def assert_each_has_its_own(model: nn.Module, runs: Sequence[Attached]) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS), 4, 5, 5, generator=g)
    rows, present = SampleRows(), list(enumerate(COUNTS))
    before = dict(vars(model.get_submodule("to_q" if hasattr(model, "to_q") else "proj")))
    with jointly_attached(model, runs, rows):
        with torch.no_grad():
            for some in (present[:1], present):
                with rows.learnt(some):
                    model(x[: sum(count for _, count in some)])
        with rows.set(present):
            y, gradients = computed(model, x, runs)
        alone = []
        for (run, count), part in zip(present, x.split(COUNTS), strict=True):
            with rows.set([(run, count)]):
                alone.append(computed(model, part, runs[run : run + 1]))
    assert vars(model.get_submodule("to_q" if hasattr(model, "to_q") else "proj")) == before
    own = iter(gradients[1:])
    for run, (part, of_x, result) in enumerate(
        zip(x.split(COUNTS), gradients[0].split(COUNTS), y.split(COUNTS), strict=True)
    ):
        with adapters_attached(model, [runs[run]]):
            expected, grads = computed(model, part, runs[run : run + 1])
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(alone[run][0], expected)
        torch.testing.assert_close([of_x, *(next(own) for _ in grads[1:])], grads, rtol=1e-4, atol=1e-5)


@pytest.fixture
def attention() -> nn.Module:
    return Attention().requires_grad_(False)


@pytest.mark.parametrize("name", slow_except([*NAMES, "input DoRA", "output DoRA"], "LoRA", "LoKr", "input DoRA"))
def test_one_algorithm(attention: nn.Module, name: str) -> None:
    assert_each_has_its_own(attention, [on(attention, name, seed) for seed in (1, 2, 3)])


@pytest.mark.parametrize("others", [("LoRA", "OFT"), ("LoKr", "input DoRA"), ("GLoRA", "output DoRA")])
def test_mixed_algorithms_targets_and_norms(attention: nn.Module, others: tuple[str, str]) -> None:
    first = on(attention, "LoRA", 1, only=("to_q", "conv"), norms=True)
    assert_each_has_its_own(
        attention, [first, on(attention, others[0], 2, norms=True), on(attention, others[1], 3, only=("to_v",))]
    )


@pytest.mark.parametrize("names", [("LoRA", "LoRA", "LoRA"), ("LoHa", "LoRA", "OFT"), ("LoRA", "GLoRA", "LoKr")])
def test_a_packed_weight(attention: nn.Module, names: Sequence[str]) -> None:
    runs = [on(attention, name, seed) for seed, name in enumerate(names, 1)]
    layer = attention.to_k
    one = packed(layer.weight.detach(), "int8", torch.float32)
    with weight_source_set(layer, one, device=torch.device("cpu"), dtype=torch.float32):
        assert_each_has_its_own(attention, runs)


def test_a_packed_weight_is_unpacked_once_for_all(attention: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [on(attention, "LoHa", seed, only=("to_k",)) for seed in (1, 2, 3)]
    one, counted = packed(attention.to_k.weight.detach(), "int8", torch.float32), []
    unpacked: Callable[..., Tensor] = type(one).weight
    monkeypatch.setattr(type(one), "weight", lambda self: (counted.append(1), unpacked(self))[1])
    x, rows = torch.randn(6, 4, 5, 5), SampleRows()
    with (
        torch.no_grad(),
        weight_source_set(attention.to_k, one, device=torch.device("cpu"), dtype=torch.float32),
        jointly_attached(attention, runs, rows),
    ):
        for some in ([(0, 2)], list(enumerate(COUNTS))):
            with rows.learnt(some):
                attention(x[: sum(count for _, count in some)])
        counted.clear()
        with rows.set(list(enumerate(COUNTS))):
            attention(x)
    assert len(counted) == 1


def test_below_a_lora_that_is_not_trained(attention: nn.Module) -> None:
    below = on(attention, "LoRA", 7)
    for parameter in parameters(below):
        parameter.requires_grad_(False)
    with adapters_attached(attention, [below]):
        runs = [on(attention, "LoRA", 1, only=("to_q",)), on(attention, "OFT", 2), on(attention, "LoRA", 3)]
        assert_each_has_its_own(attention, runs)


def test_dropout_is_of_each_run(attention: nn.Module) -> None:
    runs = [on(attention, "LoRA", seed) for seed in (1, 2, 3)]
    for one in runs[1].adapters.values():
        one.mask = torch.tensor([[1.0, 0.0, 2.0, 0.0]])  # type: ignore[assignment]
    assert_each_has_its_own(attention, runs)


def test_samples_in_the_second_dimension() -> None:
    model = TokensFirst().requires_grad_(False)
    model.forward = lambda x: model.proj(x.flatten(2).reshape(len(x), -1, 20).transpose(0, 1)).transpose(0, 1)  # type: ignore[method-assign]
    model.proj = nn.Linear(20, 16).requires_grad_(False)
    assert_each_has_its_own(model, [on(model, name, 1, only=("proj",)) for name in ("LoRA", "OFT", "LoKr")])


def test_tokens_of_all_samples_in_one_list_are_told() -> None:
    model = TokensFirst().requires_grad_(False)
    model.forward = lambda x: model.to_out(x.reshape(-1, 16))  # type: ignore[method-assign]
    rows = SampleRows()
    with jointly_attached(model, [on(model, "LoRA", seed, only=("to_out",)) for seed in (1, 2)], rows):
        for some in ([(0, 1)], [(0, 1), (1, 3)]):
            with rows.learnt(some):
                model(torch.randn(sum(count for _, count in some), 4, 4, 4))
        with (
            rows.set([(0, 1), (1, 3)]),
            pytest.raises(SamplesMixed, match=r"4 samples meet an input of shape \(16, 16"),
        ):
            model(torch.randn(4, 4, 4, 4))
