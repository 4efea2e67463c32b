"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280), rotating blocks of a layer's outputs.

    Q = B − Bᵀ,   R = (I + Q)(I − Q)⁻¹,   W'_k = Rᵀ_k W_k       for each block k of `block size` rows

Q is skew-symmetric, so its Cayley transform R is a rotation. A constraint c (COFT, `alpha` in files as ComfyUI reads
them; LyCORIS multiplies it by the number of outputs) scales Q down to ‖Q‖ = c over all blocks; 0 means none. Files may
have a `rescale` (out, 1, ...) that multiplies the rotated rows. Strength s gives I + s (R − I), rescale likewise.
`rank` is the block size: the largest divisor of the outputs not above it or their root, as in ComfyUI, or else the
smallest divisor above 1. Blocks stay within a group of a convolution in groups.
Parameters: out · block size, of which Q uses half.

In activation space the outputs are rotated before the bias, as y + y D with D = R − I = 2 (I − Q)⁻¹ Q: half precision
holds D where R would lose a small rotation beside its ones. Blocks are inverted in fp32, without a check that would
synchronize with the device, since I − Q is never singular.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter import ADAPTERS, Adapter, misfit, taken, wide
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights, PeftKind, Shapes, multiplied
from lorasmith.core.errors import OptionError

_WIDTH = 16
"""Blocks are joined up to this width: products of smaller matrices cost more than they save."""


class Rotation(Adapter):
    """Rotates the outputs of a layer by blocks; subclasses define how.

    blocks: (..., blocks, block size, block size); rescale: (out, 1, ...) or None.
    """

    transforms_output = True
    is_additive = False

    def __init__(self, blocks: Tensor, *, alpha: float, rescale: Tensor | None = None) -> None:
        super().__init__()
        self.oft_blocks = nn.Parameter(blocks)
        self.rescale = None if rescale is None else nn.Parameter(rescale)
        self.alpha = alpha

    @abstractmethod
    def turned(self, rows: Tensor, blocks: Tensor, strength: float) -> Tensor:
        """Outputs (..., channels), rotated by blocks within the constraint."""

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        blocks = constrained(self.oft_blocks, self.alpha).to(weight.device)
        rows = rescaled(self.turned(wide(weight).flatten(1).t(), blocks, strength), self.rescale, strength)
        return rows.t().reshape(weight.shape).to(weight.dtype)

    def attached(self, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, x: Tensor, strength: float) -> Tensor:
        y = inner(x)
        rows = y.movedim(1, -1) if layer.is_conv else y
        blocks = constrained(self.oft_blocks, self.alpha)
        rows = rescaled(self.turned(rows, blocks, strength), self.rescale, strength)
        return rows.movedim(-1, 1) if layer.is_conv else rows


@ADAPTERS.register("OFT")
class OftAdapter(Rotation):
    """Block-diagonal rotation of the outputs, by blocks (blocks, block size, block size)."""

    algorithm = "oft"

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> OftAdapter:
        # Rows of different groups see different inputs, so they cannot be mixed.
        together = layer.out_features // layer.groups
        sizes = [n for n in range(2, together + 1) if together % n == 0]
        if not sizes:
            raise OptionError(f"OFT rotates outputs among each other, and {path} has single ones; exclude this layer")
        size = max((n for n in sizes if n <= min(rank, math.isqrt(layer.out_features))), default=sizes[0])
        return cls(torch.zeros(layer.out_features // size, size, size), alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> OftAdapter:
        tensors = taken(weights, ["oft_blocks"], ("rescale",))
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        out = layer.out_features
        fits = blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2] and blocks.shape[0] * blocks.shape[1] == out
        if not fits or out // layer.groups % blocks.shape[1] or (rescale is not None and rescale.numel() != out):
            raise misfit(weights, layer)
        return cls(blocks, alpha=weights.alpha or 0.0, rescale=rescale)

    def turned(self, rows: Tensor, blocks: Tensor, strength: float) -> Tensor:
        return rotated(rows, blocks, strength)


def constrained(blocks: Tensor, constraint: float) -> Tensor:
    """Blocks B with ‖B − Bᵀ‖ ≤ `constraint` over all blocks; 0 is not a constraint."""
    if constraint <= 0:
        return blocks
    full = wide(blocks)
    length: Tensor = torch.linalg.vector_norm(full - full.mT)
    return full * (constraint / (length + 1e-8)).clamp(max=1)


def rotated(y: Tensor, blocks: Tensor, strength: float) -> Tensor:
    """`y + strength · y (R − I)`.

    y: outputs (..., channels); blocks: B of R, (blocks, block size, block size), blocks · block size = channels.
    """
    result: Tensor = _rotate(y, blocks, strength)
    return result


def rescaled(y: Tensor, rescale: Tensor | None, strength: float) -> Tensor:
    """Rescaled outputs. y: outputs (..., channels); rescale: factors (channels, 1, ...), or None for y itself."""
    return y if rescale is None else y * (1 + strength * (rescale.flatten() - 1)).to(y)


class _Rotate(torch.autograd.Function):
    """See `rotated`. Keeps y, and only if the blocks are trained."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, blocks: Tensor, strength: float) -> Tensor:
        y, joined = y.contiguous(), _joined(wide(blocks))
        identity = torch.eye(joined.shape[-1], dtype=joined.dtype, device=joined.device)
        inverse = torch.linalg.inv_ex(identity - joined + joined.mT).inverse
        # R = (I + Q)(I − Q)⁻¹ = 2 (I − Q)⁻¹ − I, here as I + s (R − I), or as s (R − I) for half precision.
        turn = torch.lerp(identity, inverse, 2 * strength)
        turn = turn if y.element_size() >= 4 else turn.sub_(identity).to(y.dtype)
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, turn, inverse)
        ctx.strength, ctx.shape = strength, blocks.shape
        return _turned(y, turn)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, turn, inverse = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_blocks = None
        if y is not None:
            rows, grad_rows = _in_blocks(y, turn), _in_blocks(grad, turn)
            if y.element_size() < 4 and not y.is_cuda:  # a CPU's half-precision kernels gather strided blocks slowly
                rows, grad_rows = rows.contiguous(), grad_rows.contiguous()
            grad_turn = torch.bmm(rows.mT, grad_rows).to(inverse.dtype)
            # d(I − Q)⁻¹ = (I − Q)⁻¹ dQ (I − Q)⁻¹; entries between joined blocks have no gradient.
            grad_skew = (inverse.mT @ grad_turn @ inverse.mT).mul_(2 * ctx.strength)
            grad_blocks = _apart(grad_skew - grad_skew.mT, ctx.shape)
        return _turned(grad, turn.mT) if ctx.needs_input_grad[0] else None, grad_blocks, None


_rotate: Callable[..., Tensor] = _Rotate.apply


def _turned(y: Tensor, turn: Tensor) -> Tensor:
    """y (..., channels) times R, or plus y times R − I in half precision."""
    result = torch.empty_like(y)
    if y.element_size() < 4:
        result.copy_(y)
        _in_blocks(result, turn).baddbmm_(_in_blocks(y, turn), turn)
    else:
        torch.bmm(_in_blocks(y, turn), turn, out=_in_blocks(result, turn))
    return result


def _in_blocks(y: Tensor, turn: Tensor) -> Tensor:
    """A view of y (..., channels) as (blocks, rows, block size)."""
    return y.view(-1, *turn.shape[:2]).transpose(0, 1)


def _joined(blocks: Tensor) -> Tensor:
    """Small blocks joined into fewer block-diagonal ones of up to `_WIDTH`."""
    count, size = blocks.shape[:2]
    together = next(n for n in range(min(count, max(1, _WIDTH // size)), 0, -1) if count % n == 0)
    if together == 1:
        return blocks
    joined = blocks.new_zeros(count // together, together * size, together * size)
    _diagonal(joined, size).copy_(blocks.view(-1, together, size, size).movedim(1, -1))
    return joined


def _apart(joined: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_joined`."""
    return joined if joined.shape == shape else _diagonal(joined, shape[-1]).movedim(-1, 1).reshape(shape)


def _diagonal(joined: Tensor, size: int) -> Tensor:
    """A view of joined blocks as (joined, size, size, together)."""
    together = joined.shape[-1] // size
    return joined.view(-1, together, size, together, size).diagonal(dim1=1, dim2=3)


def _weight_shape(shapes: Shapes) -> tuple[int, ...]:
    blocks = shapes["oft_blocks"]
    return (blocks[-3] * blocks[-1],)


def _rows(weights: AdapterWeights) -> dict[str, int] | None:
    if weights.alpha:  # it bounds all blocks together
        return None
    units = {"oft_blocks": weights.tensors["oft_blocks"].shape[-1]}
    return units | ({"rescale": 1} if "rescale" in weights.tensors else {})


def _bounded(weights: AdapterWeights) -> AdapterWeights:
    if not weights.alpha:
        return weights
    blocks = weights.tensors["oft_blocks"].float()
    length = float((blocks - blocks.mT).norm())
    # Rounded to a file's dtype, blocks may slightly exceed the bound that they were already scaled to.
    factor = weights.alpha / length if length > weights.alpha * 1.005 else 1.0
    shortened = multiplied(weights.tensors["oft_blocks"], factor)
    return replace(weights, tensors={**weights.tensors, "oft_blocks": shortened}, alpha=0.0)


_BLOCKS = {"oft_blocks": "blocks size size"}

OftAdapter.format = AdapterFormat(
    suffixes={name: f".{name}" for name in ("oft_blocks", "rescale")},
    needed=(frozenset({"oft_blocks"}),),
    rules=(_BLOCKS, {**_BLOCKS, "rescale": "blocks*size 1..."}),
    weight_shape=_weight_shape,
    vital=("oft_blocks",),
    rows=_rows,
    all_rows=frozenset({"rescale"}),
    bounded=_bounded,
    size=lambda shapes: shapes["oft_blocks"][-1],
    comfyui_lacks={"rescale": "it leaves out the rescale of OFT and BOFT"},
    peft=PeftKind(name="OFT", differs="turns a layer's inputs where every other program turns its outputs"),
)
