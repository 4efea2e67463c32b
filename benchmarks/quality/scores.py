"""Curves of fidelity against adherence as one number, and intervals over subjects and seeds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence

_DRAWS = 2000


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area of [0, 1]² below and left of at least one point: 1 if one point is best in both."""
    area = reached = 0.0
    for first, second in sorted(points, reverse=True):
        area += first * max(0.0, second - reached)
        reached = max(reached, second)
    return area


def interval(values: Mapping[str, Sequence[float]], *, of_subjects: bool = True) -> tuple[float, float, float]:
    """Mean with its 95 % interval, by a bootstrap of subjects and of the seeds of each; the same for equal values.

    Without `of_subjects` it says what other seeds would give for these subjects, otherwise for others, too.
    """
    rng, groups = random.Random(0), [list(one) for one in values.values()]

    def drawn() -> float:
        chosen = [rng.choice(groups) for _ in groups] if of_subjects else groups
        return statistics.mean(rng.choice(one) for one in chosen for _ in one)

    means = sorted(drawn() for _ in range(_DRAWS))
    mean = statistics.mean(one for group in groups for one in group)
    return mean, means[math.floor(0.025 * _DRAWS)], means[math.ceil(0.975 * _DRAWS) - 1]
