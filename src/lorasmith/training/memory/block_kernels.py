"""Triton kernels for what blocks of transformers compute between products: numbers are read and written once.

torch has an operation for each step, which reads and writes all numbers. Here steps are in fp32 in registers, and
results are rounded once, where torch rounds after each step. What a backward pass needs of norms is computed again.

Without Triton the functions fail. The kernels call only what `triton.language` has built in, so that Triton's
interpreter runs them if `TRITON_INTERPRET` was set when this module was imported.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations of a kernel, and knows its own alone.

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # as on Macs
    triton = None

HEADS = {"block_rows": 16}
"""Rows of a program for norms of heads; a row is one head of one token."""

BLOCK = {"block": 1024}
"""Numbers of a row at a time."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}

_ROW_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def run(name: str, *args: Any) -> Any:
    """The function of this name."""
    return _FUNCTIONS[name](*args)


def modulated(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`s = x + gate · out` (x without `out`), and `norm(s) · (1 + scale) + shift` with a layer norm.

    x and out (batch, tokens, features) contiguous; scale, shift and gate (batch or 1, features), the last stride 1.
    """
    total = x if out is None else torch.empty_like(x)
    y = torch.empty_like(x)
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    given = (x, x if out is None else out, scale if gate is None else gate, scale, shift, total, y)
    with _on(x):
        modulated_kernel[(rows,)](
            *given,
            *(x.shape[1], features, _step(scale if gate is None else gate), _step(scale), _step(shift), eps),
            has_gate=out is not None,
            has_norm=True,
            block=_padded(features),
            **_ROW_LAUNCH,
        )
    return total, y


def gated_sum(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """`x + gate · out`, as of `modulated`."""
    total = torch.empty_like(x)
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    with _on(x):
        modulated_kernel[(rows,)](
            *(x, out, gate, gate, gate, total, total),
            *(x.shape[1], features, _step(gate), 0, 0, 0.0),
            has_gate=True,
            has_norm=False,
            block=_padded(features),
            **_ROW_LAUNCH,
        )
    return total


def modulated_gradient(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, scale: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients to x and out of `modulated`, of those to y and s, both contiguous; `total` is s."""
    grad_x = torch.empty_like(total)
    grad_out = None if gate is None else torch.empty_like(total)
    rows, features = total.numel() // total.shape[-1], total.shape[-1]
    with _on(total):
        gradient_kernel[(rows,)](
            *(grad, grad if grad_total is None else grad_total, total, scale, scale if gate is None else gate),
            *(grad_x, grad_x if grad_out is None else grad_out),
            *(total.shape[1], features, _step(scale), _step(scale if gate is None else gate), eps),
            has_total=grad_total is not None,
            has_gate=gate is not None,
            block=_padded(features),
            **_ROW_LAUNCH,
        )
    return grad_x, grad_out


def turned_norm(x: Tensor, weight: Tensor, turns: Tensor, eps: float, y: Tensor) -> None:
    """Write the RMS norms of heads, times a weight, with pairs of neighbours turned, to y.

    x and y (batch, tokens, heads, features), the last stride 1; weight (features,); turns (tokens, features / 2)
    complex64, contiguous.
    """
    batch, tokens, heads, features = x.shape
    rows = batch * tokens * heads
    with _on(x):
        norm_kernel[(-(-rows // HEADS["block_rows"]),)](
            *(x, weight, torch.view_as_real(turns), y, eps, rows, tokens, heads, *x.stride()[:3], *y.stride()[:3]),
            features=features,
            padded=_padded(features),
            **HEADS,
            **LAUNCH,
        )


def turned_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
    """The gradient to x of `turned_norm`, contiguous."""
    batch, tokens, heads, features = x.shape
    rows = batch * tokens * heads
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    with _on(x):
        norm_gradient_kernel[(-(-rows // HEADS["block_rows"]),)](
            *(grad, x, weight, torch.view_as_real(turns), found, eps, rows, tokens, heads),
            *(*grad.stride()[:3], *x.stride()[:3]),
            features=features,
            padded=_padded(features),
            **HEADS,
            **LAUNCH,
        )
    return found


def gated(h: Tensor, kind: str) -> Tensor:
    """One half of features times an activation function of the other; h (..., 2 features) contiguous.

    kind: `gelu`, of the second half, or `silu`, of the first.
    """
    features = h.shape[-1] // 2
    y = h.new_empty((*h.shape[:-1], features))
    blocks = -(-features // BLOCK["block"])
    with _on(h):
        gated_kernel[(y.numel() // features * blocks,)](h, y, features, blocks, kind=kind, **BLOCK, **LAUNCH)
    return y


def gated_gradient(grad: Tensor, h: Tensor, kind: str) -> Tensor:
    """The gradient to h of `gated`, of a contiguous one."""
    features = h.shape[-1] // 2
    found = torch.empty_like(h)
    blocks = -(-features // BLOCK["block"])
    with _on(h):
        gated_gradient_kernel[(grad.numel() // features * blocks,)](
            grad, h, found, features, blocks, kind=kind, **BLOCK, **LAUNCH
        )
    return found


def joined(first: Tensor, h: Tensor) -> Tensor:
    """`cat((first, gelu(h)), -1)`, by the approximation with tanh; both contiguous."""
    before, after = first.shape[-1], h.shape[-1]
    y = h.new_empty((*h.shape[:-1], before + after))
    blocks = -(-(before + after) // BLOCK["block"])
    with _on(h):
        joined_kernel[(h.numel() // after * blocks,)](first, h, y, before, after, blocks, **BLOCK, **LAUNCH)
    return y


_FUNCTIONS = {
    one.__name__: one
    for one in (
        *(modulated, gated_sum, modulated_gradient, turned_norm, turned_norm_gradient),
        *(gated, gated_gradient, joined),
    )
}


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _step(one: Tensor) -> int:
    """From a sample to the next."""
    return one.stride(0) if len(one) > 1 else 0


def _padded(features: int) -> int:
    return 1 << (features - 1).bit_length()


def _modulated(
    x,
    out,
    gate,
    scale,
    shift,
    total,
    y,
    tokens,
    features,
    gate_sample,
    scale_sample,
    shift_sample,
    eps,
    has_gate: tl.constexpr,
    has_norm: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    sample = (row // tokens).to(tl.int64)
    start = row.to(tl.int64) * features
    column = tl.arange(0, block)
    inside = column < features
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if has_gate:
        added = tl.load(out + start + column, mask=inside, other=0.0).to(tl.float32)
        values += added * tl.load(gate + sample * gate_sample + column, mask=inside, other=0.0).to(tl.float32)
        stored = values.to(total.dtype.element_ty)
        tl.store(total + start + column, stored, mask=inside)
        values = stored.to(tl.float32)  # as the backward pass reads them
    if has_norm:
        centred = tl.where(inside, values - tl.reduce(values, 0, _plus) / features, 0.0)
        inverse = 1 / tl.sqrt_rn(tl.reduce(centred * centred, 0, _plus) / features + eps)
        factor = 1 + tl.load(scale + sample * scale_sample + column, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(shift + sample * shift_sample + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + column, (centred * inverse * factor + added).to(y.dtype.element_ty), mask=inside)


def _gradient(
    grad,
    grad_total,
    total,
    scale,
    gate,
    grad_x,
    grad_out,
    tokens,
    features,
    scale_sample,
    gate_sample,
    eps,
    has_total: tl.constexpr,
    has_gate: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    sample = (row // tokens).to(tl.int64)
    start = row.to(tl.int64) * features
    column = tl.arange(0, block)
    inside = column < features
    values = tl.load(total + start + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.reduce(values, 0, _plus) / features, 0.0)
    inverse = 1 / tl.sqrt_rn(tl.reduce(centred * centred, 0, _plus) / features + eps)
    normed = centred * inverse
    factor = 1 + tl.load(scale + sample * scale_sample + column, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(grad + start + column, mask=inside, other=0.0).to(tl.float32) * factor
    along = tl.reduce(through * normed, 0, _plus) / features
    found = inverse * (through - tl.reduce(through, 0, _plus) / features - normed * along)
    if has_total:
        found += tl.load(grad_total + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + start + column, found.to(grad_x.dtype.element_ty), mask=inside)
    if has_gate:
        found *= tl.load(gate + sample * gate_sample + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_out + start + column, found.to(grad_out.dtype.element_ty), mask=inside)


def _turned_norm(
    x,
    weight,
    table,
    y,
    eps,
    rows,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    features: tl.constexpr,
    padded: tl.constexpr,
    block_rows: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    head = (row % heads).to(tl.int64)
    token, sample = (row // heads % tokens).to(tl.int64), (row // heads // tokens).to(tl.int64)
    feature = tl.arange(0, padded)
    is_inside = (row < rows)[:, None] & (feature < features)[None, :]
    here = x + (sample * x_batch + token * x_token + head * x_head)[:, None] + feature[None, :]
    values = tl.load(here, mask=is_inside, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt_rn(tl.reduce(values * values, 1, _plus) / features + eps)
    factor = tl.load(weight + feature, mask=feature < features, other=0.0).to(tl.float32)
    values = values * inverse[:, None] * factor[None, :]
    turns = tl.load(table + (token * features)[:, None] + feature[None, :], mask=is_inside, other=0.0)
    first, second = tl.split(tl.reshape(values, (block_rows, padded // 2, 2)))
    real, imaginary = tl.split(tl.reshape(turns, (block_rows, padded // 2, 2)))
    both = tl.join(first * real - second * imaginary, second * real + first * imaginary)
    there = y + (sample * y_batch + token * y_token + head * y_head)[:, None] + feature[None, :]
    tl.store(there, tl.reshape(both, (block_rows, padded)).to(y.dtype.element_ty), mask=is_inside)


def _turned_norm_gradient(
    grad,
    x,
    weight,
    table,
    found,
    eps,
    rows,
    tokens,
    heads,
    grad_batch,
    grad_token,
    grad_head,
    x_batch,
    x_token,
    x_head,
    features: tl.constexpr,
    padded: tl.constexpr,
    block_rows: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    head = (row % heads).to(tl.int64)
    token, sample = (row // heads % tokens).to(tl.int64), (row // heads // tokens).to(tl.int64)
    feature = tl.arange(0, padded)
    is_inside = (row < rows)[:, None] & (feature < features)[None, :]
    given = grad + (sample * grad_batch + token * grad_token + head * grad_head)[:, None] + feature[None, :]
    turned = tl.load(given, mask=is_inside, other=0.0).to(tl.float32)
    turns = tl.load(table + (token * features)[:, None] + feature[None, :], mask=is_inside, other=0.0)
    first, second = tl.split(tl.reshape(turned, (block_rows, padded // 2, 2)))
    real, imaginary = tl.split(tl.reshape(turns, (block_rows, padded // 2, 2)))
    both = tl.join(first * real + second * imaginary, second * real - first * imaginary)
    factor = tl.load(weight + feature, mask=feature < features, other=0.0).to(tl.float32)
    through = tl.reshape(both, (block_rows, padded)) * factor[None, :]
    here = x + (sample * x_batch + token * x_token + head * x_head)[:, None] + feature[None, :]
    values = tl.load(here, mask=is_inside, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt_rn(tl.reduce(values * values, 1, _plus) / features + eps)
    normed = values * inverse[:, None]
    along = tl.reduce(through * normed, 1, _plus) / features
    result = inverse[:, None] * (through - normed * along[:, None])
    place = found + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(place, result.to(found.dtype.element_ty), mask=is_inside)


def _gated(h, y, features, blocks, kind: tl.constexpr, block: tl.constexpr):
    number = tl.program_id(0)
    row = (number // blocks).to(tl.int64)
    column = number % blocks * block + tl.arange(0, block)
    inside = column < features
    here = h + 2 * row * features + column
    value_at, gate_at = (features, 0) if kind == "silu" else (0, features)
    value = tl.load(here + value_at, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activated(tl.load(here + gate_at, mask=inside, other=0.0).to(tl.float32), kind)
    tl.store(y + row * features + column, (value * active).to(y.dtype.element_ty), mask=inside)


def _gated_gradient(grad, h, found, features, blocks, kind: tl.constexpr, block: tl.constexpr):
    number = tl.program_id(0)
    row = (number // blocks).to(tl.int64)
    column = number % blocks * block + tl.arange(0, block)
    inside = column < features
    start = 2 * row * features + column
    value_at, gate_at = (features, 0) if kind == "silu" else (0, features)
    value = tl.load(h + start + value_at, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activated(tl.load(h + start + gate_at, mask=inside, other=0.0).to(tl.float32), kind)
    given = tl.load(grad + row * features + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(found + start + value_at, (given * active).to(found.dtype.element_ty), mask=inside)
    tl.store(found + start + gate_at, (given * value * slope).to(found.dtype.element_ty), mask=inside)


def _joined(first, h, y, before, after, blocks, block: tl.constexpr):
    number = tl.program_id(0)
    row = (number // blocks).to(tl.int64)
    column = number % blocks * block + tl.arange(0, block)
    is_first, is_second = column < before, (column >= before) & (column < before + after)
    copied = tl.load(first + row * before + column, mask=is_first, other=0.0).to(tl.float32)
    active, _ = _activated(tl.load(h + row * after + column - before, mask=is_second, other=0.0).to(tl.float32), "tanh")
    place = y + row * (before + after) + column
    tl.store(place, tl.where(is_first, copied, active).to(y.dtype.element_ty), mask=is_first | is_second)


def _activation(x, kind: tl.constexpr):
    """An activation function and its slope."""
    if kind == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif kind == "tanh":
        share = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1 - share) * (1.5957691216057308 + 0.2140644488 * x * x)
    else:
        share = _sigmoid(x)
        slope = share + x * share * (1 - share)
    return x * share, slope


def _logistic(x):
    small = tl.exp(-tl.abs(x))  # which does not overflow
    return tl.where(x < 0, small, 1.0) / (1 + small)


def _sum_of(a, b):
    return a + b


def _kernel(function: Any) -> Any:
    return None if triton is None else triton.jit(function)


modulated_kernel = _kernel(_modulated)
gradient_kernel = _kernel(_gradient)
norm_kernel = _kernel(_turned_norm)
norm_gradient_kernel = _kernel(_turned_norm_gradient)
gated_kernel = _kernel(_gated)
gated_gradient_kernel = _kernel(_gated_gradient)
joined_kernel = _kernel(_joined)
_activated = _kernel(_activation)
_sigmoid = _kernel(_logistic)
_plus = _kernel(_sum_of)
