"""Learning rate schedules as pure functions of the step, so that resuming needs no state.

Warm-up is linear, then the schedule decays to `final_rate`. As in torch, progress is counted before the step: the first
step after the warm-up has the full rate, and the last is one step short of the end, so that no step has a rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lorasmith.core.errors import OptionError
from lorasmith.core.registry import Registry

Shape = Callable[[float, int, float], float]

SCHEDULES: Registry[Shape] = Registry("schedule")
"""Name → (progress in [0, 1], cycles, power) → multiplier in [0, 1], which is 1 at the start."""


@SCHEDULES.register("constant")
def _constant(progress: float, cycles: int, power: float) -> float:
    return 1.0


@SCHEDULES.register("linear")
def _linear(progress: float, cycles: int, power: float) -> float:
    return 1 - progress


@SCHEDULES.register("cosine")
def _cosine(progress: float, cycles: int, power: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@SCHEDULES.register("cosine_restarts")
def _cosine_restarts(progress: float, cycles: int, power: float) -> float:
    """Warm restarts of equal length (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    within = progress * cycles % 1 if progress < 1 else 1.0  # the end of the last cycle does not start another
    return _cosine(within, cycles, power)


@SCHEDULES.register("polynomial")
def _polynomial(progress: float, cycles: int, power: float) -> float:
    return float((1 - progress) ** power)


@SCHEDULES.register("rex")
def _rex(progress: float, cycles: int, power: float) -> float:
    """Reflected exponential: high for long, then steeply down (Chen et al. 2021, arXiv:2107.04197)."""
    return (1 - progress) / (1 - progress / 2)


def rate_factor(
    step: int,
    *,
    schedule: str,
    steps: int,
    warmup_steps: int,
    final_rate: float,
    cycles: int,
    power: float,
) -> float:
    """Factor of the learning rate at a step, in [0, 1].

    Steps are counted from 0; past the end the rate stays constant. `steps` includes the warm-up, in which the factor of
    the n-th step is n / `warmup_steps`. `cycles` is for cosine_restarts, `power` for polynomial.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final_rate + (1 - final_rate) * SCHEDULES[schedule](progress, cycles, power)


def check_schedule(*, steps: int, warmup_steps: int) -> None:
    """Raise OptionError if the warm-up is longer than the run."""
    if warmup_steps > steps:
        raise OptionError(
            f"warmup_steps must be at most the steps of the run, got {warmup_steps} of {steps}; lower warmup_steps or "
            "raise steps"
        )
