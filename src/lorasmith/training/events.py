"""What a training run tells its audience: progress bars, plots, logs and sockets; the loop only reports."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "EventHandler", "RunFinished", "RunStarted", "StepDone", "Warned", "as_json"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        at: seconds since the epoch.
    """

    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to take its first step.

    Attributes:
        steps: updates to come.
        steps_before: updates that an existing LoRA had already.
        samples: samples in the dataset.
        adapters: adapted layers.
        parameters: trained numbers.
        device, dtype: where and in which format the frozen model runs.
    """

    steps: int
    steps_before: int
    samples: int
    adapters: int
    parameters: int
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """The loss of one update has reached the host.

    Attributes:
        step: counted from 1.
        loss: mean over the step's samples.
        grad_norm: length of the gradient before clipping.
    """

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the person should know, in one sentence; training goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """No more steps will come.

    Attributes:
        step: updates taken in this run.
        reason: `finished`, `cancelled` or `failed`.
    """

    step: int
    reason: str


EventHandler = Callable[[Event], None]


def as_json(event: Event) -> dict[str, Any]:
    """An event as a line of `events.jsonl`."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}
