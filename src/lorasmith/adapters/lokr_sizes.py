"""Sizes of LoKr's factors: those of given tensors, those that ComfyUI and we choose, and PEFT's.

PEFT computes the factors of all modules from one `decompose_factor` and the rank, so that adapters fit into one of its
folders only if some factor gives their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.core.adapter_format import Shapes
from lorasmith.core.adapter_state import AdapterWeights

__all__ = ["factor_shapes", "factorization", "peft_fields", "peft_misfits", "rank_in"]


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """(a, b) with a · b = dimension and a ≤ b, a as large as possible but not above `factor`.

    This is ComfyUI's rule. LyCORIS' is the same up to the root of the dimension; beyond it a factor that divides the
    dimension gives (dimension / factor, factor) there. Loaders read the shapes from the file.
    """
    a = next(a for a in range(min(factor, math.isqrt(dimension)), 0, -1) if dimension % a == 0)
    return a, dimension // a


def factor_shapes(shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two factors, (out_l, in_m) and (out_k, in_n[, kh, kw]), whether they are whole or products."""
    found: list[tuple[int, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            found.append(tuple(shapes[name]))
        elif name == "lokr_w2" and "lokr_t2" in shapes:
            found.append((shapes[f"{name}_a"][1], shapes[f"{name}_b"][1], *shapes["lokr_t2"][2:]))
        else:
            found.append((shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]))
    return found[0], found[1]


def rank_in(shapes: Shapes) -> int | None:
    """Denominator of the scale alpha / rank; None for two whole factors."""
    return next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)


def peft_fields(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, Any]:
    """Fields of PEFT's configuration for LoKrs.

    Args:
        adapters: by module path.
        kernels: number of weights in each module's convolution kernel, 1 for a Linear.
    """
    factors = [_Factors.of(weights, kernels[path]) for path, weights in adapters.items()]
    return {
        "use_effective_conv2d": any("lokr_t2" in weights.tensors for weights in adapters.values()),
        "decompose_both": any(not one.whole_first for one in factors),
        "decompose_factor": _best_factor(factors),
    }


def peft_misfits(adapters: Mapping[str, AdapterWeights], kernels: Mapping[str, int]) -> dict[str, str]:
    """Module path → reason, for LoKrs of other sizes than PEFT's rule gives. Arguments as `peft_fields`."""
    factors = {path: _Factors.of(weights, kernels[path]) for path, weights in adapters.items()}
    factor = _best_factor(list(factors.values()))
    both = any(not one.whole_first for one in factors.values())
    reason = f"PEFT makes LoKr's factors by one rule for all modules (decompose_factor, here {factor}), of other sizes"
    return {path: reason for path, one in factors.items() if not one.made_by(factor, both)}


@dataclass(frozen=True)
class _Factors:
    """A LoKr's sizes: out = out_l · out_k and in = in_m · in_n channels, and which factors are whole."""

    out: tuple[int, int]
    inside: tuple[int, int]
    rank: int
    whole_first: bool
    whole_second: bool

    @classmethod
    def of(cls, weights: AdapterWeights, kernel: int) -> _Factors:
        shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
        (out_l, in_m), (out_k, *inner) = factor_shapes(shapes)
        in_n = inner[0] // kernel if len(inner) == 1 else inner[0]  # a flat factor has the kernel in its columns
        rank = rank_in(shapes) or max(out_k, in_n)
        return cls((out_l, out_k), (in_m, in_n), rank, "lokr_w1" in shapes, "lokr_w2" in shapes)

    def made_by(self, factor: int, decompose_both: bool) -> bool:
        """Whether PEFT's rule gives factors of these sizes."""
        whole_first = not (decompose_both and self.rank < max(self.out[0], self.inside[0]) / 2)
        whole_second = self.rank >= max(self.out[1], self.inside[1]) / 2
        return (
            _factorized(math.prod(self.out), factor) == self.out
            and _factorized(math.prod(self.inside), factor) == self.inside
            and (whole_first, whole_second) == (self.whole_first, self.whole_second)
        )


def _best_factor(factors: Sequence[_Factors]) -> int:
    """The `decompose_factor` that gives most of the adapters their sizes."""
    both = any(not one.whole_first for one in factors)
    candidates = sorted({-1, *(one.out[0] for one in factors), *(one.inside[0] for one in factors)})
    return max(candidates, key=lambda factor: sum(one.made_by(factor, both) for one in factors))


def _factorized(size: int, factor: int) -> tuple[int, int]:
    """PEFT's factorization of a size: `factor` and the quotient, or if it does not divide the size, the most equal two
    divisors of which the smaller is at most `factor` (any, for −1)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first
