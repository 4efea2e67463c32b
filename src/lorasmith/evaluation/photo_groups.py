"""Photos grouped by their features: which of them show something else than most, and which are nearly the same.

Groups are those of average linkage, cut at `CUT_DISTANCE`, found on DreamBooth's photos (docs/lab-log.md):
features say what a picture shows, so several views of one thing are one group, and another thing is one of its own.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

CUT_DISTANCE = 0.35
"""Mean cosine of the features of two groups below which they stay apart."""

MARGIN = 0.2
"""How much more alike the photos of the largest group must be than they are to the others."""

SAME = 0.94
"""Cosine from which two photos are mirrored, or of the same moment."""

_LEAST = 3  # photos of the largest group


def odd_ones_out(features: Tensor) -> list[int]:
    """The photos that show something else than most, by their features (N, width) of length 1; ascending indices.

    Empty where no group of at least 3 has half of the photos, or where it stands out by less than `MARGIN`, as in a
    collection of different things in one style.
    """
    alike = (features @ features.T).double().numpy()
    main = max(_groups(alike), key=len, default=[])
    others = sorted(set(range(len(alike))) - set(main))
    if not others or len(main) < max(_LEAST, len(others)):
        return []
    inside = alike[np.ix_(main, main)]
    within = (inside.sum() - np.trace(inside)) / (len(main) * (len(main) - 1))
    return others if within - alike[np.ix_(main, others)].mean() >= MARGIN else []


def nearly_same(features: Tensor) -> list[tuple[int, int]]:
    """Pairs of photos of which the second nearly equals the first, an earlier one; each is second at most once."""
    alike = (features @ features.T).numpy()
    found = []
    for index in range(1, len(alike)):
        before = int(np.argmax(alike[index, :index]))
        if alike[index, before] >= SAME:
            found.append((before, index))
    return found


def _groups(alike: np.ndarray) -> list[list[int]]:
    """Groups of average linkage, by the cosines (N, N) of their members."""
    groups: list[list[int]] = [[index] for index in range(len(alike))]
    means = alike.copy()
    np.fill_diagonal(means, -np.inf)
    while len(groups) > 1:
        first, second = sorted(map(int, np.unravel_index(np.argmax(means), means.shape)))
        if means[first, second] < CUT_DISTANCE:
            break
        sizes = len(groups[first]), len(groups[second])
        # The mean over pairs of members, by Lance and Williams.
        means[first] = means[:, first] = (sizes[0] * means[first] + sizes[1] * means[second]) / sum(sizes)
        means[first, first] = -np.inf
        means = np.delete(np.delete(means, second, axis=0), second, axis=1)
        groups[first] += groups.pop(second)
    return groups
