"""RMS norms and rotary embeddings with backward passes of their own: the same numbers in fewer operations.

Autograd's backward pass has an operation for each of the forward pass, and keeps an fp32 copy of a norm's input. Here:

    RMS norm            torch's on a CPU, with a frozen weight; keeps the input and one number a row
    rotary embedding    diffusers' `apply_rotary_emb` (Flux, Flux.2, Chroma, Krea 2, HunyuanVideo, Lumina 2) and that of
                        Qwen-Image; keeps nothing, and is one kernel on a GPU with Triton (`rotary_kernel`)

Every step is rounded as torch and diffusers round it, so results and gradients have their bits on a CPU. Compilers are
given the originals, which they fuse themselves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from lorasmith.core.kernels import Kernel, kernel_or


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
    """Inside the context, diffusers' models call `apply_rotary_emb` and `apply_rotary_emb_qwen` of this module."""
    with contextlib.ExitStack() as stack:
        for rotation in (_ROTATION, _QWEN_ROTATION):
            stack.enter_context(rotation.replaced())
        yield


class _Replaced:
    """A function of a module of diffusers, and how many contexts have replaced it in each module that has it."""

    def __init__(self, home: str, name: str, ours: Callable[..., Tensor]) -> None:
        self.original: Callable[..., Tensor] | None = None
        self._home, self._name, self._ours = home, name, ours
        self._uses: Counter[str] = Counter()

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        if (home := sys.modules.get(self._home)) is None:
            yield
            return
        if not self._uses.total():
            self.original = getattr(home, self._name)
        known = (self.original, self._ours)
        loaded = [name for name in list(sys.modules) if name.startswith("diffusers.models.")]
        users = [name for name in loaded if vars(sys.modules[name]).get(self._name) in known]
        for name in users:
            setattr(sys.modules[name], self._name, self._ours)
        self._uses.update(users)
        try:
            yield
        finally:
            self._uses.subtract(users)
            for name in users:
                if not self._uses[name]:
                    setattr(sys.modules[name], self._name, self.original)


def apply_rotary_emb(x: Tensor, freqs_cis: Any, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' function of that name."""
    return _rotated(_ROTATION, x, freqs_cis, args, kwargs)


def apply_rotary_emb_qwen(x: Tensor, freqs_cis: Any, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' function of that name."""
    return _rotated(_QWEN_ROTATION, x, freqs_cis, args, kwargs)


def _rotated(theirs: _Replaced, x: Tensor, table: Any, args: Any, kwargs: Any) -> Tensor:
    if not torch.compiler.is_compiling() and not args:
        # Where tokens come before heads, features turn in pairs of neighbours, which have one angle; a route may have
        # tables for each sample instead.
        is_pair = kwargs == {"sequence_dim": 1} and isinstance(table[0], Tensor)
        if is_pair and table[0].dtype == torch.float32:
            return rotary_embedding(x, turns_of(table, x.device), rounds_twice=True)
        if kwargs == {"use_real": False} and (turns := _complex_turns(table, x.device)) is not None:
            return rotary_embedding(x, turns, rounds_twice=False)
    assert theirs.original is not None
    return theirs.original(x, table, *args, **kwargs)


_ROTATION = _Replaced("diffusers.models.embeddings", "apply_rotary_emb", apply_rotary_emb)
_QWEN_ROTATION = _Replaced(
    "diffusers.models.transformers.transformer_qwenimage", "apply_rotary_emb_qwen", apply_rotary_emb_qwen
)


@wrap_torch_function(lambda x, *_args, **_kwargs: (x,))
def rotary_embedding(x: Tensor, turns: Tensor, *, rounds_twice: bool) -> Tensor:
    """Pairs of neighbours among the features of x (batch, tokens, heads, features), times complex numbers.

    Args:
        turns: (tokens, features / 2) or (batch, tokens, features / 2), complex64 of absolute value 1.
        rounds_twice: whether the gradient of both terms of the product is rounded to the dtype of x, as autograd does
            where diffusers casts x and the turned x one by one.
    """
    y: Tensor = _RotaryEmbedding.apply(x, turns, rounds_twice)
    return y


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, rounds_twice: bool) -> Tensor:
        ctx.turns, ctx.rounds_twice = turns, rounds_twice
        turned: Tensor = rotation_on(x.device).run(_with_rows(x), turns, 1.0)
        return turned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, turns = _with_rows(grads[0]), ctx.turns  # some attentions return gradients with another order
        if not ctx.rounds_twice or grad.dtype == torch.float32 or grad.device.type != "cpu":
            return rotation_on(grad.device).run(grad, turns, -1.0), None, None
        wide = grad.float()
        across = _times(wide, turns.imag * -1j).to(grad.dtype)
        return _times(wide, turns.real).to(grad.dtype).add_(across), None, None


@functools.cache
def rotation_on(device: torch.device) -> Kernel:
    """What turns pairs on a device, with the signature of `_turned`."""
    name = "rotary embeddings"
    if device.type != "cuda":
        return Kernel(name, _turned)
    x = torch.linspace(-1, 1, 2 * 3 * 5 * 48, device=device).reshape(2, 3, 5, 48)
    angles = torch.linspace(-3, 3, 2 * 3 * 24, device=device).reshape(2, 3, 24)
    turns = torch.polar(torch.ones_like(angles), angles)

    def load() -> Callable[..., Any]:
        from lorasmith.training.memory.rotary_kernel import turned

        return turned

    trials = [(x, table, direction) for table in (turns, turns[0]) for direction in (1.0, -1.0)]
    return kernel_or(name, _turned, load, trials, tolerance=1e-5)


def _turned(x: Tensor, turns: Tensor, direction: float) -> Tensor:
    """Pairs of neighbours among the features of x, times `turns`, or their conjugates if `direction` is -1."""
    return _times(x, turns if direction > 0 else _cached_on(turns, _BACK, lambda: turns.conj().resolve_conj()))


def _times(x: Tensor, factors: Tensor) -> Tensor:
    """x (batch, tokens, heads, features) as complex numbers of two neighbours each, times real or complex factors."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors.unsqueeze(-2)).flatten(-2).to(x.dtype)


def _with_rows(x: Tensor) -> Tensor:
    """x with neighbours side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


_TURNS, _BACK = "_lorasmith_turns", "_lorasmith_back"
"""Attributes of tables: what was made of them, for all layers of a pass."""


def turns_of(tables: Sequence[Tensor], device: torch.device) -> Tensor:
    """cos + i sin of each pair of neighbours, from tables (tokens, features) of both."""
    return _cached_on(tables[0], _TURNS, lambda: torch.complex(*(table.to(device)[:, ::2] for table in tables)))


def _complex_turns(table: Any, device: torch.device) -> Tensor | None:
    """A complex table in complex64; None for another."""
    if not isinstance(table, Tensor) or not table.is_complex():
        return None
    if table.dtype == torch.complex64:
        return table
    # GPUs are slow at the products in fp64 that Lumina 2's table makes; on a CPU they have diffusers' bits.
    return None if device.type == "cpu" else _cached_on(table, _TURNS, lambda: table.to(torch.complex64))


def _cached_on(table: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    if (known := getattr(table, name, None)) is None:
        known = make()
        setattr(table, name, known)
    found: Tensor = known
    return found
