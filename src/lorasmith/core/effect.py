"""Whether a LoRA has an effect: the change of a weight relative to it, ‖W' − W‖ / ‖W‖ in Frobenius norms.

Trained LoRAs change most weights by 0.1 to 10 %. Below `LEAST_EFFECT` in every layer no picture shows them: on the
built-in model no pixel differs by more than one step of 255.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LEAST_EFFECT = 1e-4


def relative_change(before: Tensor, after: Tensor) -> float:
    """‖after − before‖ / ‖before‖ of a parameter, on its device; the norm of `after` where `before` is zero."""
    base, change = (
        float(torch.linalg.vector_norm(tensor.float())) for tensor in (before, after.float() - before.float())
    )
    return change / base if base else change


def idle_change(changes: Iterable[float | None]) -> float | None:
    """The largest relative change of a LoRA without effect; None for every other LoRA.

    It stops at the first change of `LEAST_EFFECT` or more, so that a generator computes those of an effective LoRA for
    one layer. None is a change that is not known.
    """
    largest = None
    for change in changes:
        if change is None or not change < LEAST_EFFECT:  # a change of NaN is not small
            return None
        largest = change if largest is None else max(largest, change)
    return largest
