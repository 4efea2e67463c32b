"""Statistics of the protocol: what is reached when, and paired comparisons over subjects.

Arrays have subjects first. A subject is one observation, the mean of its seeds; seeds differ less than subjects do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MARGIN = 0.03
"""Of fidelity × adherence: recipes that differ by less are called equivalent. It was fixed before any test run."""

_EXACT = 16  # subjects up to which all signs are tried
_DRAWS = 20_000
_Z_OF_POWER = 1.96 + 0.8416  # two-sided error of 5 %, power of 80 %


def reach(positions: Sequence[float], curve: Array, level: float) -> float:
    """The position at which the running maximum of a curve attains a level, linear over logarithms of positions.

    The first position if it is attained there already, infinite if it is never.
    """
    best = np.maximum.accumulate(curve)
    if best[-1] < level:
        return math.inf
    place = int(np.argmax(best >= level))
    if place == 0:
        return float(positions[0])
    share = (level - best[place - 1]) / (best[place] - best[place - 1])
    return float(positions[place - 1] * (positions[place] / positions[place - 1]) ** share)


def value_at(positions: Array, curve: Array, position: float) -> float:
    """A curve between its positions, linear over their logarithms; its ends beyond them."""
    return float(np.interp(math.log(position), np.log(positions), curve))


def sign_flip_p(differences: Array) -> float:
    """Two-sided p of paired differences having a mean of 0, by flipping their signs: all of them, or 20,000 draws."""
    count = len(differences)
    if count <= _EXACT:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (_DRAWS, count))
    means = np.abs(signs @ differences)
    extreme = means >= abs(differences.sum()) * (1 - 1e-12)
    return float(extreme.mean() if count <= _EXACT else (extreme.sum() + 1) / (_DRAWS + 1))


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def bootstrap(values: Array, statistic: Callable[[Array], float], *, inside: float = 0.95) -> tuple[float, float]:
    """Interval of a statistic by a bootstrap of subjects."""
    rng, draws = np.random.default_rng(0), 2000
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - inside) / 2, (1 + inside) / 2], method="nearest")
    return float(low), float(high)


def compared(differences: Array, p: float) -> str:
    """Ahead or behind by a corrected p below 5 %, equivalent by two one-sided tests within the margin, or open."""
    if p < 0.05:
        return "ahead" if differences.mean() > 0 else "behind"
    low, high = bootstrap(differences, lambda some: float(some.mean()), inside=0.9)
    return "equivalent" if low > -MARGIN and high < MARGIN else "open"


def variance_components(differences: Array) -> tuple[float, float]:
    """Variances of paired differences (subjects, seeds): between subjects, and of the seeds of a subject."""
    _, seeds = differences.shape
    within = float(differences.var(axis=1, ddof=1).mean())
    between = float(differences.mean(axis=1).var(ddof=1)) - within / seeds
    return max(0.0, between), within


def seeds_needed(between: float, within: float, subjects: int, difference: float = MARGIN) -> float:
    """Seeds of each of so many subjects that show a difference with a power of 80 %; infinite if none do."""
    left = subjects * (difference / _Z_OF_POWER) ** 2 - between
    return max(1, math.ceil(within / left)) if left > 0 else math.inf
