"""When a loss has exploded. Pure: losses in, an answer out, so that a resumed run decides as the first one did."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["exploded"]

_FACTOR = 10.0
_LAG = 10
_WINDOW = 100
_ENOUGH = 20


def exploded(losses: Sequence[float]) -> bool:
    """Whether the last loss is beyond anything that a sound run would show.

    It is compared with the largest of the hundred losses that end ten steps ago, since single losses differ by orders
    of magnitude (a batch of one at a clean noise level has a hundredth of the loss of one at a noisy level), and since
    a loss that doubles with each step is never far above the one before. NaN entries, of steps that were left out, do
    not count.
    """
    before = [loss for loss in losses[-_LAG - _WINDOW - 1 : -_LAG - 1] if math.isfinite(loss)]
    return len(before) >= _ENOUGH and losses[-1] > _FACTOR * max(before)
