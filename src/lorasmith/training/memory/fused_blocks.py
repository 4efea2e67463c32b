"""Blocks of diffusers' transformers on a GPU, with what is between their products in few kernels (`block_kernels`).

    what                                                    where
    layer norm · (1 + scale) + shift                        AdaLayerNormZero, AdaLayerNormZeroSingle, blocks of Flux.1
    x + gate · output, and the norm behind it               blocks of Flux.1
    RMS norms of queries and keys, rotary embeddings        attention of Flux.1
    activation functions with gates                         GEGLU (UNets), Flux2SwiGLU
    GELU beside the output of attention                     single blocks of Flux.1
    x / 1, which copies                                     attention and residual blocks of UNets

Gradients to scales, shifts and gates are not computed: where a LoRA is on the layers that make them, as on all other
devices and in fp16, the blocks run as they are. Compilers are given the originals, which they fuse themselves. Numbers
differ from theirs in the last bits: each result is rounded once, where torch rounds after each operation.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.inject import restore_forward
from lorasmith.core.kernels import Kernel, kernel_or
from lorasmith.training.memory.backward_passes import turns_of

_LONGEST = 8192
"""Most features of a row that the kernels normalize."""


@contextlib.contextmanager
def blocks_fused(module: nn.Module) -> Iterator[None]:
    """Inside the context, blocks of known classes run in fewer kernels on a GPU."""
    with contextlib.ExitStack() as undo:
        for part in module.modules():
            forward = _FORWARDS.get(f"{type(part).__module__}.{type(part).__qualname__}")
            if forward is not None and "forward" not in part.__dict__:
                undo.callback(restore_forward, part, None)
                setattr(part, "forward", types.MethodType(forward, part))  # noqa: B010 - to a type checker a method
            for name in _DIVISORS:
                divisor = part.__dict__.get(name)
                if isinstance(divisor, int | float) and divisor == 1:
                    undo.callback(setattr, part, name, divisor)
                    setattr(part, name, _ONE)
        yield


class _One:
    """1, by which no tensor on a GPU is divided."""

    def __rtruediv__(self, x: Tensor) -> Tensor:
        return x if x.device.type == "cuda" else x / 1.0


_ONE = _One()

_DIVISORS = ("rescale_output_factor", "output_scale_factor")
"""Attributes of modules of diffusers by which they divide their results, and that they use for nothing else."""


def has_kernels(x: Tensor) -> bool:
    """Whether what is computed of x may run in the kernels."""
    is_usual = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float32)
    return is_usual and not kernels_on(x.device).refusal


@functools.cache
def kernels_on(device: torch.device) -> Kernel:
    """What runs the functions of `block_kernels` on a device, with the signature of its `run`."""
    name = "operations between products"
    if device.type != "cuda":
        return Kernel(name, by_torch)

    def load() -> Callable[..., Any]:
        from lorasmith.training.memory.block_kernels import run

        return run

    return kernel_or(name, by_torch, load, _trials(device), tolerance=1e-4)


def _trials(device: torch.device) -> Sequence[Sequence[Any]]:
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)

    x, out, scale, shift, gate = some(2, 3, 48), some(2, 3, 48), some(2, 48), some(1, 48), some(2, 48)
    heads, wide = some(1, 5, 2, 24), some(1, 3, 2 * 72)
    turns = torch.polar(torch.ones(5, 12), torch.linspace(-3, 3, 60).view(5, 12)).to(device)
    return [
        ("modulated", x, scale, shift, 1e-6, None, None),
        ("modulated", x, scale, shift, 1e-6, out, gate),
        ("gated_sum", x, out, gate),
        ("modulated_gradient", out, None, x, scale, 1e-6, None),
        ("modulated_gradient", out, x, x, scale, 1e-6, gate),
        ("turned_norm_gradient", heads, heads, heads[0, 0, 0], turns, 1e-6),
        *(("gated", wide, kind) for kind in ("gelu", "silu")),
        *(("gated_gradient", wide[..., :72].contiguous(), wide, kind) for kind in ("gelu", "silu")),
        ("joined", x, out),
    ]


class _Modulated(torch.autograd.Function):
    """x + gate · out, and its norm with scale and shift; gradients to x and out alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        run = kernels_on(x.device).run
        x = x.contiguous()
        total, y = run("modulated", x, scale, shift, eps, None if out is None else out.contiguous(), gate)
        total = x.view_as(x) if out is None else total
        ctx.save_for_backward(total, scale, gate)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scale, gate = ctx.saved_tensors
        grad_total, grad = (None if one is None else one.contiguous() for one in grads)
        if grad is None:
            grad_out = None if gate is None or grad_total is None else grad_total * gate.unsqueeze(1)
            return grad_total, grad_out, None, None, None, None
        run = kernels_on(total.device).run
        grad_x, grad_out = run("modulated_gradient", grad, grad_total, total, scale, ctx.eps, gate)
        return grad_x, grad_out, None, None, None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        y: Tensor = kernels_on(x.device).run("gated_sum", x.contiguous(), out.contiguous(), gate)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        return grads[0], grads[0] * gate.unsqueeze(1), None


class _TurnedNorms(torch.autograd.Function):
    """Norms of heads of one or two sequences, which are turned and joined."""

    @staticmethod
    def forward(ctx: Any, turns: Tensor, eps: Sequence[float], weights: Sequence[Tensor], *parts: Tensor) -> Tensor:
        tokens = [part.shape[1] for part in parts]
        batch, _, *rest = parts[0].shape
        y = parts[0].new_empty((batch, sum(tokens), *rest))
        run = kernels_on(y.device).run
        for part, weight, one, its, place in zip(
            parts, weights, eps, turns.split(tokens), y.split(tokens, dim=1), strict=True
        ):
            run("turned_norm", part, weight, its, one, place)
        ctx.save_for_backward(*parts)
        ctx.turns, ctx.eps, ctx.weights, ctx.tokens = turns, eps, weights, tokens
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        run = kernels_on(grad.device).run
        given = (ctx.saved_tensors, ctx.weights, ctx.eps, ctx.turns.split(ctx.tokens), grad.split(ctx.tokens, dim=1))
        found = [
            run("turned_norm_gradient", its, part, weight, turns, eps)
            for part, weight, eps, turns, its in zip(*given, strict=True)
        ]
        return None, None, None, *found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, kind: str) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        ctx.kind = kind
        y: Tensor = kernels_on(h.device).run("gated", h, kind)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        return kernels_on(h.device).run("gated_gradient", grads[0].contiguous(), h, ctx.kind), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        y: Tensor = kernels_on(h.device).run("joined", first.contiguous(), h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        first, second = grads[0].split([grads[0].shape[-1] - h.shape[-1], h.shape[-1]], dim=-1)
        return first, torch.ops.aten.gelu_backward(second, h, approximate="tanh")


def _is_bare(norm: object, x: Tensor) -> bool:
    """Whether a norm is a layer norm of all features without factors."""
    features = x.shape[-1]
    is_usual = type(norm) is nn.LayerNorm and norm.normalized_shape == (features,) and norm.weight is None
    return is_usual and norm.bias is None and features <= _LONGEST  # type: ignore[attr-defined]


def _modulated(
    norm: Any, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = _Modulated.apply(x, out, gate, scale, shift, norm.eps)
    return pair


def _norm_zero(
    self: Any,
    x: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> Any:
    """The forward of `AdaLayerNormZero`."""
    if self.emb is None and emb is not None and has_kernels(x) and x.ndim == 3 and _is_bare(self.norm, x):
        made = self.linear(self.silu(emb))
        if not made.requires_grad:
            shift, scale, *rest = made.chunk(6, dim=1)
            return _modulated(self.norm, x, scale, shift)[1], *rest
    return type(self).forward(self, x, timestep, class_labels, hidden_dtype, emb)


def _norm_zero_single(self: Any, x: Tensor, emb: Tensor) -> Any:
    """The forward of `AdaLayerNormZeroSingle`."""
    if has_kernels(x) and x.ndim == 3 and _is_bare(self.norm, x):
        made = self.linear(self.silu(emb))
        if not made.requires_grad:
            shift, scale, gate = made.chunk(3, dim=1)
            return _modulated(self.norm, x, scale, shift)[1], gate
    return type(self).forward(self, x, emb)


def _gated_by_gelu(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of `GEGLU`."""
    if args or kwargs or not has_kernels(hidden_states):
        y: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
    else:
        y = _Gated.apply(self.proj(hidden_states), "gelu")
    return y


def _gated_by_silu(self: Any, x: Tensor) -> Tensor:
    """The forward of `Flux2SwiGLU`."""
    if not has_kernels(x) or type(self.gate_fn) is not nn.SiLU:
        y: Tensor = type(self).forward(self, x)
    else:
        y = _Gated.apply(x, "silu")
    return y


def _double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of `FluxTransformerBlock`."""
    norms = (self.norm1.norm, self.norm1_context.norm, self.norm2, self.norm2_context)
    is_usual = has_kernels(hidden_states) and all(_is_bare(norm, hidden_states) for norm in norms)
    makers = (self.norm1, self.norm1_context)
    # The third result of an adapter for pictures is not one of these blocks.
    if is_usual and not _names_pictures(joint_attention_kwargs):
        own, context = (one.linear(one.silu(temb)) for one in makers)
        if not own.requires_grad and not context.requires_grad:
            shift, scale, gate, shift_ff, scale_ff, gate_ff = own.chunk(6, dim=1)
            shift_c, scale_c, gate_c, shift_ff_c, scale_ff_c, gate_ff_c = context.chunk(6, dim=1)
            x, normed = _modulated(norms[0], hidden_states, scale, shift)
            c, normed_c = _modulated(norms[1], encoder_hidden_states, scale_c, shift_c)
            y, y_c = self.attn(
                hidden_states=normed,
                encoder_hidden_states=normed_c,
                image_rotary_emb=image_rotary_emb,
                **(joint_attention_kwargs or {}),
            )
            x, normed = _modulated(norms[2], x, scale_ff, shift_ff, y, gate)
            x = _GatedSum.apply(x, self.ff(normed), gate_ff)
            c, normed_c = _modulated(norms[3], c, scale_ff_c, shift_ff_c, y_c, gate_c)
            return _GatedSum.apply(c, self.ff_context(normed_c), gate_ff_c), x
    pair: tuple[Tensor, Tensor] = type(self).forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
    )
    return pair


def _names_pictures(given: Mapping[str, Any] | None) -> bool:
    """Whether an attention is given pictures, whose result is one more."""
    return given is not None and any(name.startswith("ip_") for name in given)


def _single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of `FluxSingleTransformerBlock`."""
    is_usual = has_kernels(hidden_states) and _is_bare(self.norm.norm, hidden_states)
    if is_usual and getattr(self.act_mlp, "approximate", "") == "tanh":
        made = self.norm.linear(self.norm.silu(temb))
        if not made.requires_grad:
            shift, scale, gate = made.chunk(3, dim=1)
            x, normed = _modulated(self.norm.norm, _both(encoder_hidden_states, hidden_states), scale, shift)
            wide = self.proj_mlp(normed)
            mixed = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            y = _GatedSum.apply(x, self.proj_out(_Joined.apply(mixed, wide)), gate)
            text = encoder_hidden_states.shape[1]
            return y[:, :text], y[:, text:]
    pair: tuple[Tensor, Tensor] = type(self).forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
    )
    return pair


def _both(text: Tensor, image: Tensor) -> Tensor:
    """`cat((text, image), 1)`, or what the block before divided into these."""
    whole = text._base
    if whole is not None and whole is image._base and whole.is_contiguous():
        length = text.shape[1]
        shape = (image.shape[0], length + image.shape[1], *image.shape[2:])
        starts = (text.storage_offset(), image.storage_offset() - text.storage_offset())
        if whole.shape == shape and starts == (whole.storage_offset(), length * image.shape[-1]):
            return whole
    return torch.cat((text, image), dim=1)


def _attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    """The forward of `FluxAttention`."""
    norms = [self.norm_q, self.norm_k]
    has_text = encoder_hidden_states is not None and self.added_kv_proj_dim is not None
    if has_text:
        norms += [self.norm_added_q, self.norm_added_k]
    x = hidden_states
    is_usual = (
        has_kernels(x)
        and not kwargs
        and type(self.processor).__name__ == "FluxAttnProcessor"
        and not self.fused_projections
        and has_text == (self.added_kv_proj_dim is not None)
        and all(_norms_heads(norm, x.dtype, self.head_dim) for norm in norms)
        and _is_table(image_rotary_emb)
    )
    if not is_usual:
        return type(self).forward(self, x, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
    q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.to_q, self.to_k, self.to_v))
    queries, keys = [q], [k]
    if has_text:
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text_q, text_k, text_v = (layer(encoder_hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in added)
        queries, keys, v = [text_q, q], [text_k, k], torch.cat((text_v, v), dim=1)
    turns = turns_of(image_rotary_emb, x.device).contiguous()
    q, k = (_turned_norms(parts, own[::-1], turns) for parts, own in ((queries, norms[::2]), (keys, norms[1::2])))
    diffusers = sys.modules[type(self).__module__]
    mixed = diffusers.dispatch_attention_fn(
        *(q, k, v),
        attn_mask=attention_mask,
        backend=self.processor._attention_backend,
        parallel_config=self.processor._parallel_config,
    )
    mixed = mixed.flatten(2, 3).to(q.dtype)
    if encoder_hidden_states is None:
        return mixed
    text = encoder_hidden_states.shape[1]
    own, theirs = mixed[:, text:].contiguous(), mixed[:, :text].contiguous()
    return self.to_out[1](self.to_out[0](own)), self.to_add_out(theirs)


def _turned_norms(parts: Sequence[Tensor], norms: Sequence[Any], turns: Tensor) -> Tensor:
    eps = [torch.finfo(torch.float32).eps if norm.eps is None else norm.eps for norm in norms]
    y: Tensor = _TurnedNorms.apply(turns, eps, [norm.weight for norm in norms], *parts)
    return y


def _norms_heads(norm: object, dtype: torch.dtype, features: int) -> bool:
    """Whether a norm is a RMS norm of heads with a frozen weight."""
    if type(norm) is not nn.RMSNorm or norm.normalized_shape != (features,):
        return False
    weight: Tensor | None = norm.weight
    return weight is not None and not weight.requires_grad and weight.dtype == dtype


def _is_table(given: Any) -> bool:
    """Whether rotary embeddings are tables of cosines and sines of all tokens."""
    table = given[0] if isinstance(given, tuple) and given else None
    return isinstance(table, Tensor) and table.ndim == 2 and table.dtype == torch.float32


_FLUX = "diffusers.models.transformers.transformer_flux"

_FORWARDS: Mapping[str, Callable[..., Any]] = {
    "diffusers.models.normalization.AdaLayerNormZero": _norm_zero,
    "diffusers.models.normalization.AdaLayerNormZeroSingle": _norm_zero_single,
    "diffusers.models.activations.GEGLU": _gated_by_gelu,
    "diffusers.models.transformers.transformer_flux2.Flux2SwiGLU": _gated_by_silu,
    f"{_FLUX}.FluxTransformerBlock": _double_block,
    f"{_FLUX}.FluxSingleTransformerBlock": _single_block,
    f"{_FLUX}.FluxAttention": _attention,
}
"""By the class that has the forward."""


def by_torch(name: str, *args: Any) -> Any:
    """The function of `block_kernels` of this name, in operations of torch."""
    return _BY_TORCH[name](*args)


def _modulated_by_torch(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if out is None or gate is None else x + gate.unsqueeze(1) * out
    return total, F.layer_norm(total, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _gradients(function: Callable[..., Tensor], grad: Tensor, *given: Tensor) -> Sequence[Tensor]:
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in given]
        return torch.autograd.grad(function(*leaves), leaves, grad)


def _modulated_gradient_by_torch(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, scale: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    (found,) = _gradients(lambda x: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)), grad, total)
    found = found if grad_total is None else found + grad_total
    return found, None if gate is None else found * gate.unsqueeze(1)


def _turned_norm_by_torch(x: Tensor, weight: Tensor, turns: Tensor, eps: float, y: Tensor) -> None:
    y.copy_(_turned_by_torch(F.rms_norm(x, x.shape[-1:], weight, eps), turns))


def _turned_by_torch(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).to(x.dtype)


def _gated_by_torch(h: Tensor, kind: str) -> Tensor:
    first, second = h.chunk(2, dim=-1)
    return F.silu(first) * second if kind == "silu" else first * F.gelu(second)


_BY_TORCH: Mapping[str, Callable[..., Any]] = {
    "modulated": _modulated_by_torch,
    "gated_sum": lambda x, out, gate: x + gate.unsqueeze(1) * out,
    "modulated_gradient": _modulated_gradient_by_torch,
    "turned_norm": _turned_norm_by_torch,
    "turned_norm_gradient": lambda grad, x, weight, turns, eps: _gradients(
        lambda x: _turned_by_torch(F.rms_norm(x, x.shape[-1:], weight, eps), turns), grad, x
    )[0],
    "gated": _gated_by_torch,
    "gated_gradient": lambda grad, h, kind: _gradients(lambda h: _gated_by_torch(h, kind), grad, h)[0],
    "joined": lambda first, h: torch.cat((first, F.gelu(h, approximate="tanh")), dim=-1),
}
