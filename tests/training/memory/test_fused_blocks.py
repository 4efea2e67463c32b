"""Blocks of diffusers with fewer kernels between their products compute what theirs do, and leave nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from torch import Tensor, nn

from lorasmith.core.kernels import Kernel
from lorasmith.training.memory import fused_blocks
from lorasmith.training.memory.activations import activations_reduced
from lorasmith.training.memory.fused_blocks import blocks_fused
from tests.core.triton_kernels import interpreted

WIDTH, HEADS, TEXT, IMAGE = 48, 2, 3, 5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The functions that kernels compute, as they would on a GPU, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run, found = interpreted("lorasmith.training.memory.block_kernels", monkeypatch).run, Counter[str]()

    def counted(name: str, *args: Any) -> Any:
        found[name] += 1
        return run(name, *args)

    monkeypatch.setattr(fused_blocks, "kernels_on", lambda _: Kernel("", counted))
    monkeypatch.setattr(fused_blocks, "has_kernels", lambda _: True)
    return found


class Transformer(nn.Module):
    """A double and two single blocks of Flux.1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FluxTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
        self.rest = nn.ModuleList(FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS) for _ in range(2))
        self.table = FluxPosEmbed(10_000, [4, 10, 10])

    def forward(self, text: Tensor, image: Tensor, temb: Tensor) -> Tensor:
        turns = self.table(torch.arange(3.0 * (TEXT + IMAGE)).view(-1, 3))
        for block in (self.first, *self.rest):
            text, image = block(image, text, temb, turns)
        return torch.cat((text, image), dim=1)


def random(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + number))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm_" in name:
            parameter.copy_(1 + random(*parameter.shape) / 4)
    return module


def gradients(module: nn.Module, inputs: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[Tensor]:
    """Results, and gradients to inputs and other tensors."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    results = module(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((one * random(*one.shape, number=1)).sum() for one in results)
    assert isinstance(total, Tensor)
    return [*results, *torch.autograd.grad(total, [*leaves, *others], allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_of_flux(calls: Counter[str], batch: int) -> None:
    module, temb = made(Transformer), random(batch, WIDTH)
    inputs = (random(batch, TEXT, WIDTH), random(batch, IMAGE, WIDTH, number=2))

    class Given(nn.Module):
        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            y: Tensor = module(text, image, temb)
            return y

    expected = gradients(Given(), inputs)
    with blocks_fused(module):
        found = gradients(Given(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    norms = 4 + 2  # each with a gradient
    heads = 4 + 2 * 2
    assert calls == {
        "modulated": norms, "modulated_gradient": norms, "gated_sum": 2 + 2, "joined": 2,
        "turned_norm": heads, "turned_norm_gradient": heads,
    }  # fmt: skip
    assert not any("forward" in part.__dict__ for part in module.modules())


def test_text_and_picture_of_the_block_before_are_not_joined_again() -> None:
    whole = random(1, TEXT + IMAGE, WIDTH).requires_grad_() * 1
    parts = whole[:, :TEXT], whole[:, TEXT:]
    assert fused_blocks._both(*parts) is whole
    for text, image in (
        *((parts[1], parts[0]), (parts[0], parts[0]), (parts[0].clone(), parts[1]), (parts[0], parts[1][:, 1:])),
        (whole[:, :TEXT, :8], whole[:, TEXT:, :8]),
    ):
        assert torch.equal(fused_blocks._both(text, image), torch.cat((text, image), dim=1))


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: GEGLU(WIDTH, 20), WIDTH),
        (Flux2SwiGLU, WIDTH),
        (lambda: Modulated(AdaLayerNormZero(WIDTH)), WIDTH),
        (lambda: Modulated(AdaLayerNormZeroSingle(WIDTH)), WIDTH),
    ],
    ids=["GEGLU", "SwiGLU", "norm", "norm of a single block"],
)
def test_parts_of_other_models(calls: Counter[str], make: Any, width: int) -> None:
    module, x = made(make), random(2, IMAGE, width)
    expected = gradients(module, [x])
    with blocks_fused(module):
        found = gradients(module, [x])
    assert calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Modulated(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Any:
        return self.norm(x, emb=random(2, WIDTH))


def test_gradients_of_what_makes_scales_are_those_of_diffusers(calls: Counter[str]) -> None:
    module = made(lambda: Modulated(AdaLayerNormZero(WIDTH)))
    weight: Tensor = module.norm.linear.weight.requires_grad_()  # type: ignore[union-attr]
    x = random(2, IMAGE, WIDTH)
    expected = gradients(module, [x], [weight])
    with blocks_fused(module):
        found = gradients(module, [x], [weight])
    assert not calls
    assert expected[-1].any() and torch.equal(found[-1], expected[-1])


def test_another_device_runs_the_blocks_as_they_are() -> None:
    module, x = made(lambda: GEGLU(WIDTH, 20)), random(2, IMAGE, WIDTH)
    expected = gradients(module, [x])
    with blocks_fused(module):
        assert "forward" in module.__dict__
        assert all(torch.equal(one, other) for one, other in zip(gradients(module, [x]), expected, strict=True))
    assert "forward" not in module.__dict__


def test_nothing_is_divided_by_one_on_a_gpu() -> None:
    module = made(lambda: Attention(16, heads=2, dim_head=8))
    module.other = Attention(16, heads=2, dim_head=8, rescale_output_factor=2.0)  # type: ignore[assignment]
    x = random(1, IMAGE, 16)
    expected = module(x)
    with blocks_fused(module):
        assert torch.equal(module(x), expected)

        class OnGpu(torch.Tensor):
            device = torch.device("cuda")  # type: ignore[assignment]

        here = x.as_subclass(OnGpu)
        assert here / module.rescale_output_factor is here  # type: ignore[operator]
        assert module.other.rescale_output_factor == 2.0  # type: ignore[union-attr]
    assert module.rescale_output_factor == 1.0


@pytest.mark.parametrize("kind", ["keep", "lean"])
@pytest.mark.parametrize("compiled", [False, True])
def test_compilers_and_recipes_are_given_the_blocks_as_they_are(kind: Any, compiled: bool) -> None:
    module = made(lambda: GEGLU(WIDTH, 20))
    with activations_reduced(module, kind, compiled=compiled):
        assert ("forward" in module.__dict__) == (kind == "keep" and not compiled)


def test_a_forward_that_somebody_gave_a_block_stays() -> None:
    module = made(lambda: GEGLU(WIDTH, 20))
    module.forward = own = lambda x: x  # type: ignore[method-assign,assignment]
    with blocks_fused(module):
        assert module.forward is own
    assert module.forward is own
