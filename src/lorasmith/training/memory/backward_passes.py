"""RMS norms and rotary embeddings with backward passes of their own: the same numbers in fewer operations.

Autograd's backward pass has an operation for each of the forward pass, and keeps an fp32 copy of a norm's input. Here:

    RMS norm            torch's on a CPU, with a frozen weight; keeps the input and one number a row
    rotary embedding    diffusers' `apply_rotary_emb` (Flux, Flux.2, Chroma, Krea 2, HunyuanVideo); keeps nothing,
                        and is one kernel on a GPU with Triton (`rotary_kernel`)

Every step is rounded as torch and diffusers round it, so results and gradients have their bits on a CPU. Compilers are
given the originals, which they fuse themselves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function


def norm_forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The forward of a torch RMS norm."""
    weight: Tensor | None = norm.weight
    is_frozen = weight is None or (not weight.requires_grad and weight.dtype == x.dtype)
    # On a GPU torch has one kernel for either pass.
    is_usual = x.device.type == "cpu" and x.dtype != torch.float64 and len(norm.normalized_shape) == 1
    if torch.compiler.is_compiling() or not is_usual or not is_frozen:
        return F.rms_norm(x, norm.normalized_shape, weight, norm.eps)
    return rms_norm(x, weight, torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)


# So that what records torch functions sees one operation of that name.
@wrap_torch_function(lambda x, *_: (x,))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x, with a weight (features,) that gets no gradient."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y = wide * inverse
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, wide = grads[0].float(), x.float()
        grad = grad if weight is None else grad * weight
        through = (grad * wide).sum(-1, keepdim=True)  # to 1 / RMS
        through = -0.5 * through * inverse.pow(3) / x.shape[-1]  # to each square
        return (grad * inverse).add_(wide * (2 * through)).to(x.dtype), None, None


@contextlib.contextmanager
def rotations_replaced() -> Iterator[None]:
    """Inside the context, diffusers' models call `apply_rotary_emb` of this module."""
    if (embeddings := sys.modules.get("diffusers.models.embeddings")) is None:
        yield
        return
    if not _Rotations.uses.total():
        _Rotations.original = embeddings.apply_rotary_emb
    known = (_Rotations.original, apply_rotary_emb)
    loaded = [name for name in list(sys.modules) if name.startswith("diffusers.models.")]
    users = [name for name in loaded if vars(sys.modules[name]).get("apply_rotary_emb") in known]
    for name in users:
        vars(sys.modules[name])["apply_rotary_emb"] = apply_rotary_emb
    _Rotations.uses.update(users)
    try:
        yield
    finally:
        _Rotations.uses.subtract(users)
        for name in users:
            if not _Rotations.uses[name]:
                vars(sys.modules[name])["apply_rotary_emb"] = _Rotations.original


class _Rotations:
    """diffusers' function, and how many contexts have replaced it in each module."""

    original: ClassVar[Callable[..., Tensor]]
    uses: ClassVar[Counter[str]] = Counter()


def apply_rotary_emb(x: Tensor, freqs_cis: Any, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' function of that name."""
    # Where tokens come before heads, features turn in pairs of neighbours, which have one angle; a route may have
    # tables for each sample instead.
    is_usual = kwargs == {"sequence_dim": 1} and not args and isinstance(freqs_cis[0], Tensor)
    if torch.compiler.is_compiling() or not is_usual or freqs_cis[0].dtype != torch.float32:
        return _Rotations.original(x, freqs_cis, *args, **kwargs)
    cos, sin = (one.to(x.device) for one in freqs_cis)
    return rotary_embedding(x, cos, sin)


@wrap_torch_function(lambda x, *_: (x,))
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours among the features of x (batch, tokens, heads, features), turned by an angle for each token.

    cos, sin: of the angles, (tokens, features) fp32, equal for neighbours.
    """
    y: Tensor = _RotaryEmbedding.apply(x, cos, sin)
    return y


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _turned_on(x.device)(_with_rows(x), cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (cos, sin) = grads, ctx.angles
        grad = _with_rows(grad)  # some attentions return gradients with another order
        if grad.dtype == torch.float32 or grad.device.type != "cpu":
            return _turned_on(grad.device)(grad, cos, sin, -1.0), None, None
        # diffusers casts x and the turned x one by one, so autograd rounds both of their gradients.
        wide = grad.float()
        across = _times(wide, _turns(cos, sin)[0].imag * -1j).to(grad.dtype)
        return (wide * cos[:, None]).to(grad.dtype).add_(across), None, None


@functools.cache
def _turned_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The kernel on a GPU where it runs and is right; `_turned` elsewhere."""
    if device.type != "cuda":
        return _turned
    x = torch.linspace(-1, 1, 2 * 3 * 5 * 48, device=device).reshape(2, 3, 5, 48)
    each = torch.linspace(-3, 3, 3 * 24, device=device).reshape(3, 24).repeat_interleave(2, -1)
    cos, sin = each.cos(), each.sin()
    try:
        from lorasmith.training.memory.rotary_kernel import turned

        is_right = all(
            torch.allclose(turned(x, cos, sin, way), _turned(x, cos, sin, way), atol=1e-5) for way in (1.0, -1.0)
        )
    except Exception:  # Triton has errors of many classes: about packages, drivers and compilers
        return _turned
    return turned if is_right else _turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Neighbours among the features of x (batch, tokens, heads, features), turned by `direction` times their angles."""
    return _times(x, _turns(cos, sin)[direction < 0])


def _times(x: Tensor, turns: Tensor) -> Tensor:
    """x (batch, tokens, heads, features) as complex numbers of two neighbours each, times `turns`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def _with_rows(x: Tensor) -> Tensor:
    """x with neighbours side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


_TURNS = "_lorasmith_turns"
"""Attribute of cosines: what `_turns` made of them, for all layers of a pass."""


def _turns(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos + i sin of each pair and its conjugate, (tokens, 1, features / 2)."""
    if (known := getattr(cos, _TURNS, None)) is None:
        turns = torch.complex(cos[:, ::2], sin[:, ::2])[:, None]
        known = turns, turns.conj().resolve_conj()
        setattr(cos, _TURNS, known)
    return known
