"""The change of a weight by an adapter, as a matrix (out, in · kernel) with rows in memory order, often of low rank.

LoRA, LoHa, LoKr and full differences add a ΔW that depends on their tensors alone. DoRA scales the sum with W, and OFT,
BOFT and GLoRA transform W, so their change depends on the weight. The formulas are those of `Adapter.merged`.

Sums, norms and the best approximation of a given rank do without full matrices. That of rank r in the Frobenius norm is
the singular value decomposition truncated to r values (Eckart and Young 1936). For a product up · down it is found
through QR decompositions of the two factors and an SVD of their rank-sized core; for a large matrix through a random
projection with power iterations (Halko, Martinsson and Tropp 2009, arXiv:0909.4061). The kept energy is the share of
the squared singular values.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import format_of
from lorasmith.adapters.inject import load_adapters
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.core.random import keyed_normal
from lorasmith.formats.scales import scale_of
from lorasmith.formats.spelling import ModuleTensors, without_core

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_ROUNDING = 1e-9  # share of the energy that is ignored, so that rounding does not add a singular value
_ALWAYS_EXACT = 256  # smaller side up to which a full decomposition is fast


def share(kept: float, total: float) -> float:
    """Share of the squared singular values that is kept, 0 to 1; 1 if there are none."""
    return min(kept / total, 1.0) if total else 1.0


@dataclass(frozen=True)
class Truncated:
    """An approximation up · down of a matrix, in fp32."""

    up: Tensor  # (out, rank), each column of norm √σ
    down: Tensor  # (rank, in), each row of norm √σ
    kept: float  # sum of its squared singular values
    total: float  # sum of all squared singular values

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def energy(self) -> float:
        """Share of the squared singular values that is kept, 0 to 1; 1 for a matrix of zeros."""
        return share(self.kept, self.total)


@dataclass(frozen=True)
class MatrixChange:
    """A matrix up · down + dense; either part may be missing."""

    factors: tuple[Tensor, Tensor] | None = None  # up (out, rank) and down (rank, in)
    dense: Tensor | None = None  # (out, in)

    @property
    def is_nothing(self) -> bool:
        """Whether both parts are missing; the shape is then unknown."""
        return self.factors is None and self.dense is None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.factors is not None:
            return self.factors[0].shape[0], self.factors[1].shape[1]
        assert self.dense is not None, "a change of nothing has no shape"
        return self.dense.shape[0], self.dense.shape[1]

    def times(self, factor: float) -> MatrixChange:
        factors = None if self.factors is None else (self.factors[0] * factor, self.factors[1])
        return MatrixChange(factors, None if self.dense is None else self.dense * factor)

    def matrix(self) -> Tensor:
        """The whole matrix (out, in) in fp32."""
        whole = torch.zeros(self.shape) if self.dense is None else self.dense.float()
        return whole if self.factors is None else whole + self.factors[0].float() @ self.factors[1].float()

    def norm(self) -> float:
        """Frobenius norm, to rounding in fp64 for a product."""
        if self.factors is None or self.dense is not None:
            return float(torch.linalg.matrix_norm(self.matrix().double()))
        up, down = self.factors
        return float(torch.linalg.matrix_norm(_triangle(up) @ _triangle(down.T).T))

    def inner(self, other: MatrixChange) -> float:
        """Sum of the products of corresponding entries."""
        if self.factors is None or other.factors is None or self.dense is not None or other.dense is not None:
            return float((self.matrix().double() * other.matrix().double()).sum())
        (up, down), (other_up, other_down) = self.factors, other.factors
        return float(((up.double().T @ other_up.double()) * (down.double() @ other_down.double().T)).sum())

    def truncated(self, *, rank: int | None = None, energy: float | None = None, key: str = "") -> Truncated:
        """The best approximation of at most `rank`, or of the least rank that keeps the share `energy`, or both.

        `key` seeds the random projection of large matrices. Raises LoraError if the squares of a dense matrix exceed
        fp32.
        """
        if self.factors is not None and self.dense is None:
            u, s, vh = _svd_of_product(*self.factors)
            total, slack = square_sum(s), _ROUNDING
        else:
            matrix = self.matrix()
            total, slack = square_sum(matrix), 1e-6
            if not total <= torch.finfo(torch.float32).max:  # a decomposition computes with squares
                raise LoraError(
                    f"the squares of the change of {key or 'a module'} must be within the numbers of fp32, and "
                    "are not; lower the strength or get the file again"
                )
            u, s, vh = _svd_of_matrix(matrix, rank, key)
            # The energy of values that were not computed follows from the norm, with the precision of fp32.
            if len(s) == min(matrix.shape):
                total, slack = square_sum(s), _ROUNDING
        count = _rank_for(s, total, rank, None if energy is None else energy - slack)
        root = s[:count].sqrt()
        return Truncated(
            up=(u[:, :count] * root).float().cpu(),
            down=(root[:, None] * vh[:count]).float().cpu(),
            kept=square_sum(s[:count]),
            total=total,
        )


def square_sum(tensor: Tensor) -> float:
    """The sum of squares in fp64, in one pass."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def stacked(*changes: MatrixChange) -> MatrixChange:
    """The sum of matrices of equal shape: products are stacked along the rank, which is exact."""
    factors = [change.factors for change in changes if change.factors is not None]
    dense = [change.dense.float() for change in changes if change.dense is not None]
    ups, downs = [up.float() for up, _ in factors], [down.float() for _, down in factors]
    return MatrixChange(
        (torch.cat(ups, dim=1), torch.cat(downs)) if factors else None, torch.stack(dense).sum(0) if dense else None
    )


def _triangle(matrix: Tensor) -> Tensor:
    """R of the QR decomposition in fp64: it has the matrix's norms and inner products, on the smaller side alone."""
    triangle: Tensor = torch.linalg.qr(matrix.double(), mode="r").R
    return triangle


def _svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k,), Vᵀ (k, in) of up · down in fp64, k at most the rank."""
    left, left_core = torch.linalg.qr(up.double())
    right, right_core = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def _svd_of_matrix(matrix: Tensor, rank: int | None, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of a matrix in fp32: all of them, or the first `rank` and a few if the matrix is large."""
    smaller = min(matrix.shape)
    sought = smaller if rank is None else rank + _OVERSAMPLING
    if smaller <= max(_ALWAYS_EXACT, 4 * sought):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    probe = keyed_normal((matrix.shape[1], sought), 0, "svd", key).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        # Orthogonalized after each product, or rounding would leave the largest values alone.
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _rank_for(singular: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    count = len(singular) if rank is None else min(rank, len(singular))
    if energy is not None and total:
        kept = singular.double().square().cumsum(0) / total
        enough = int((kept < energy).sum()) + 1
        count = min(count, enough)
    return max(1, count)


def is_low_rank(weights: AdapterWeights) -> bool:
    """Whether the change is scale · up · down, with or without magnitudes."""
    return format_of(weights).is_low_rank


def is_plain_lora(weights: AdapterWeights) -> bool:
    """Whether the change is scale · up · down, without magnitudes."""
    return is_low_rank(weights) and "dora_scale" not in weights.tensors


def is_additive(weights: AdapterWeights) -> bool:
    """Whether the change is the same for every weight."""
    return format_of(weights).is_additive and "dora_scale" not in weights.tensors


def factors_of(weights: AdapterWeights) -> MatrixChange:
    """up · down of a LoRA, unscaled, in fp32; a Tucker core is multiplied in, magnitudes are left out."""
    tensors = without_core(weights).tensors
    return MatrixChange((tensors["up"].float().flatten(1), tensors["down"].float().flatten(1)))


def added_by(module: ModuleTensors, shape: tuple[int, ...] | None = None) -> MatrixChange:
    """The sum of a module's additive changes of its weight at strength 1.

    `shape` is the weight's; None derives it from the tensors.
    """
    changes = []
    if (weights := module.adapter) is not None:
        if is_low_rank(weights):
            changes.append(factors_of(weights).times(scale_of(weights)))
        else:
            empty = torch.zeros(shape or weight_shape(weights))
            changes.append(MatrixChange(dense=merged_weight(module, layer_like(None, empty), empty, 1.0).flatten(1)))
            return changes[0]
    if "weight" in module.differences:
        difference = module.differences["weight"].float()
        changes.append(MatrixChange(dense=difference.reshape(len(difference), -1)))
    return stacked(*changes)


def as_lora(cut: Truncated, shape: tuple[int, ...], alpha: float) -> AdapterWeights:
    """A truncated matrix (out, in · kernel) as a LoRA for a weight of `shape` (out, in, *kernel)."""
    point = (1,) * (len(shape) - 2)
    tensors = {
        "down": cut.down.reshape(cut.rank, *shape[1:]).contiguous(),
        "up": cut.up.reshape(-1, cut.rank, *point).contiguous(),
    }
    return AdapterWeights("lora", tensors, alpha)


def merged_weight(module: ModuleTensors, layer: nn.Module, weight: Tensor, strength: float) -> Tensor:
    """`weight` with adapter and difference folded in, in its dtype; fp32 avoids rounding between several modules.

    `layer` gives kind and geometry. Raises LoraError if the adapter does not fit it, or its algorithm is unknown.
    """
    if module.adapter is not None:
        adapter = load_adapters(nn.ModuleDict({"layer": layer}), {"layer": module.adapter})["layer"]
        weight = adapter.to(weight.device).merged(weight, strength).detach()
    if "weight" in module.differences:
        weight = added(weight, module.differences["weight"], strength)
    return weight


def changed_weight(modules: Sequence[tuple[ModuleTensors, float]], layer: nn.Module, weight: Tensor) -> Tensor:
    """`weight` with each module's tensors folded in at its strength, in order; see `merged_weight`."""
    for module, strength in modules:
        weight = merged_weight(module, layer_like(layer, weight), weight, strength)
    return weight


def has_full_difference(module: ModuleTensors) -> bool:
    """Whether it has a difference of a whole weight, not only of the vectors of norms."""
    difference = module.differences.get("weight")
    return difference is not None and difference.ndim > 1


def added(tensor: Tensor, difference: Tensor, strength: float) -> Tensor:
    """`tensor + strength · difference`, computed in fp32, in the tensor's dtype.

    Raises LoraError if the numbers of elements differ.
    """
    if difference.numel() != tensor.numel():
        raise LoraError(
            f"a difference must have the shape of what it changes, {tuple(tensor.shape)}, and has "
            f"{tuple(difference.shape)}; take files that were trained on the same model"
        )
    total = torch.add(tensor.float(), difference.reshape(tensor.shape).to(tensor.device, torch.float32), alpha=strength)
    return total.to(tensor.dtype)


def layer_like(module: nn.Module | None, weight: Tensor) -> nn.Module:
    """A layer with a given weight, of the kind of `module`, or if that is None, of a kind that fits the weight."""
    parameter = nn.Parameter(weight, requires_grad=False)
    if module is None:
        with torch.device("meta"):
            module = nn.Linear(1, 1) if weight.ndim == 2 else _CONVOLUTIONS[weight.ndim - 3](1, 1, 1)
    layer = copy.copy(module)
    layer._parameters = {**module._parameters, "weight": parameter}
    return layer


def weight_shape(weights: AdapterWeights) -> tuple[int, ...]:
    """Shape of an additive adapter's weight, as far as its tensors determine it: kernels may be flattened."""
    return format_of(weights).shape_of(weights)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
