"""Detection of exploding losses. A pure function of the losses, so that a resumed run decides the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

_FACTOR = 10.0
_LAG = 10
_WINDOW = 100
_ENOUGH = 20


def exploded(losses: Sequence[float]) -> bool:
    """Whether the last loss exceeds ten times the largest of the hundred losses that end ten steps earlier.

    A window, since losses differ by orders of magnitude between noise levels; the gap detects a loss that doubles with
    each step. NaN entries, of skipped steps, do not count.
    """
    before = [loss for loss in losses[-_LAG - _WINDOW - 1 : -_LAG - 1] if math.isfinite(loss)]
    return len(before) >= _ENOUGH and losses[-1] > _FACTOR * max(before)
