"""Averages of weights over training with a power function (Karras et al. 2024, arXiv:2312.02696, section 3).

    θ̂(t) = Σ_k w_k(t) θ(k),   w_k(t) = (k^(γ+1) − (k−1)^(γ+1)) / t^(γ+1),   k = 1 … t

A recursion keeps it: θ̂(t) = β θ̂(t−1) + (1 − β) θ(t) with β = (1 − 1/t)^(γ+1). Its length is σ_rel, the standard
deviation of its weights as a part of t. From averages of two lengths, saved a few times, that of any length is
reconstructed by least squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasmith.core.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LENGTHS = (0.05, 0.10)
"""σ_rel of the averages that are kept."""

AVERAGES = "averages"
"""Subfolder of a run with its saved averages."""

LONGEST = 1 / math.sqrt(12)
"""σ_rel of the mean over all steps, γ = 0."""


@functools.cache
def exponent(sigma_rel: float) -> float:
    """γ of a length. Raises OptionError unless it is above 0 and at most that of the mean over all steps."""
    if not 0 < sigma_rel <= LONGEST + 1e-4:
        raise OptionError(
            f"the length of an average must be above 0 and at most {LONGEST:.3f}, the mean over all steps, got "
            f"{sigma_rel:g}; choose one such as 0.1"
        )
    low, high = 0.0, 1.0
    while length(high) > sigma_rel:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > sigma_rel else (low, middle)
    return low


def length(gamma: float) -> float:
    """σ_rel of an exponent γ: √(γ + 1) / ((γ + 2) √(γ + 3))."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def kept_share(step: int, gamma: float) -> float:
    """β of a step counted from 1: the share of the average that is kept."""
    kept: float = (1 - 1 / step) ** (gamma + 1)
    return kept


def profile(step: int, gamma: float, steps: int) -> NDArray[np.float64]:
    """Weights (steps,) of the average after `step`, which add up to 1; 0 for later steps."""
    import numpy as np

    edges = (np.minimum(np.arange(steps + 1), step) / step) ** (gamma + 1)
    weights: NDArray[np.float64] = np.diff(edges)
    return weights


def coefficients(
    kept: Sequence[tuple[int, float]], wanted: tuple[int, float], steps: int
) -> tuple[NDArray[np.float64], float]:
    """Factors of averages (step, γ) whose sum is nearest to the wanted one, and the distance relative to that.

    Factors add up to 1, so that what is constant in training stays.
    """
    import numpy as np

    goal = profile(*wanted, steps)
    profiles = np.stack([profile(*kept_average, steps) for kept_average in kept])
    last, others = profiles[-1], profiles[:-1]
    solution = np.linalg.lstsq((others - last).T, goal - last, rcond=None)[0]
    factors: NDArray[np.float64] = np.append(solution, 1 - solution.sum())
    return factors, float(np.linalg.norm(factors @ profiles - goal) / np.linalg.norm(goal))
