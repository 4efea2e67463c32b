"""RMS norms and rotary embeddings beside torch's and diffusers': bits of results and gradients, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux, transformer_lumina2, transformer_qwenimage
from torch import Tensor, nn

from lorasmith.training.memory.activations import activations_packed, activations_reduced, recipes_recorded
from lorasmith.training.memory.backward_passes import rotations_replaced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_THEIRS = embeddings.apply_rotary_emb


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(function: Callable[[Tensor], Tensor], x: Tensor, swapped: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the input; two dimensions of both are `swapped` in memory."""
    x = laid_out(x, swapped).requires_grad_()
    y = function(x)
    y.backward(laid_out(random(*y.shape, dtype=y.dtype, seed=1), swapped))
    assert x.grad is not None
    return y.detach(), x.grad


def laid_out(x: Tensor, swapped: tuple[int, int]) -> Tensor:
    return x.transpose(*swapped).clone(memory_format=torch.contiguous_format).transpose(*swapped)


def angles(tokens: int, features: int) -> tuple[Tensor, Tensor]:
    each = 3 * random(tokens, features // 2, seed=2).repeat_interleave(2, -1)
    return each.cos(), each.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("eps", [1e-6, None])
def test_norms_have_the_bits_of_torchs(dtype: torch.dtype, has_weight: bool, eps: float | None) -> None:
    norm = nn.RMSNorm(48, eps=eps, elementwise_affine=has_weight, dtype=dtype).requires_grad_(False)
    if has_weight:
        norm.weight.copy_(random(48, dtype=dtype, seed=3))
    x = random(2, 5, 3, 48, dtype=dtype)
    expected = passed(norm, x)
    with activations_reduced(norm, "keep"):
        found = passed(norm, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swapped", [(0, 0), (1, 2), (1, 3)])
def test_rotations_have_the_bits_of_diffusers(dtype: torch.dtype, swapped: tuple[int, int]) -> None:
    x, given = random(2, 6, 3, 16, dtype=dtype), angles(6, 16)
    expected = passed(lambda x: _THEIRS(x, given, sequence_dim=1), x, swapped)
    with rotations_replaced():
        found = passed(lambda x: transformer_flux.apply_rotary_emb(x, given, sequence_dim=1), x, swapped)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["of all samples", "of each sample"])
def test_complex_tables_have_the_bits_of_diffusers(dtype: torch.dtype, kind: str) -> None:
    x, turns = random(2, 6, 3, 16, dtype=dtype), torch.complex(*angles(6, 16))[:, ::2]
    if kind == "of all samples":
        module, name = transformer_qwenimage, "apply_rotary_emb_qwen"
    else:
        module, name, turns = transformer_lumina2, "apply_rotary_emb", torch.stack([turns, turns.conj().resolve_conj()])
    before = getattr(module, name)
    expected = passed(lambda x: before(x, turns, use_real=False), x)
    with rotations_replaced():
        assert getattr(module, name) is not before
        found = passed(lambda x: getattr(module, name)(x, turns, use_real=False), x)
    assert getattr(module, name) is before
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_rotations_are_diffusers_own() -> None:
    x, given = random(2, 3, 6, 16), angles(6, 16)
    theirs = transformer_qwenimage.apply_rotary_emb_qwen
    with rotations_replaced():
        for arguments in ({}, {"sequence_dim": 2}, {"use_real_unbind_dim": -2}):
            found = embeddings.apply_rotary_emb(x, given, **arguments)
            assert torch.equal(found, _THEIRS(x, given, **arguments))
        assert torch.equal(transformer_qwenimage.apply_rotary_emb_qwen(x, given), theirs(x, given))


def test_diffusers_has_its_function_back_after_the_last_context() -> None:
    first, second = rotations_replaced(), rotations_replaced()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert transformer_flux.apply_rotary_emb is not _THEIRS
    second.__exit__(None, None, None)
    assert transformer_flux.apply_rotary_emb is embeddings.apply_rotary_emb is _THEIRS


def test_a_norm_keeps_its_input_and_a_rotation_nothing() -> None:
    norm = nn.RMSNorm(16, dtype=torch.bfloat16).requires_grad_(False)
    x, given = random(2, 6, 3, 16, dtype=torch.bfloat16).requires_grad_(), angles(6, 16)
    kept: list[Tensor] = []
    with (
        activations_reduced(norm, "keep"),
        torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one),
    ):
        transformer_flux.apply_rotary_emb(norm(x), given, sequence_dim=1)
    assert [one for one in kept if one.numel() >= x.numel()] == [x]


def test_both_are_recomputed_in_lean() -> None:
    norm = nn.RMSNorm(128).requires_grad_(False)
    x, given = random(1, 64, 8, 128).requires_grad_(), angles(64, 128)
    gradients = []
    for kind in ("keep", "lean"):
        with activations_reduced(norm, kind), activations_packed(kind, norm):
            y = transformer_flux.apply_rotary_emb(norm(2 * x), given, sequence_dim=1)
            loss = F.scaled_dot_product_attention(y, y, x).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*gradients)
    with activations_reduced(norm, "lean"), recipes_recorded() as recipes:
        scaled = 2 * x
        recipes.pack(scaled)
        y = transformer_flux.apply_rotary_emb(norm(scaled), given, sequence_dim=1)
        assert recipes.pack(y) is not y
