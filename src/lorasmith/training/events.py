"""Events that a training run reports to its handlers: progress bars, plots, logs and sockets."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lorasmith.core.choices import Activations
from lorasmith.core.printable import printable
from lorasmith.core.typed_json import typed


class Outcome(StrEnum):
    """Why a run ended; values are those in files."""

    FINISHED = "finished"
    """All steps were taken."""
    STOPPED = "stopped"
    """Early stopping: no improvement for `patience` validations."""
    CANCELLED = "cancelled"
    """The user ended it."""
    FAILED = "failed"
    """An error ended it."""

    @property
    def is_final(self) -> bool:
        """Whether the run is complete and cannot be resumed."""
        return self in (Outcome.FINISHED, Outcome.STOPPED)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    at: float = field(default_factory=time.time)  # seconds since the epoch


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to take its first step."""

    steps: int  # planned updates
    steps_before: int  # updates of the LoRA that is continued
    samples: int  # in the dataset
    adapters: int  # adapted layers
    parameters: int  # number of trained parameters
    device: str  # of the frozen model, as `dtype`
    dtype: str
    folder: str = ""  # of the run, empty if there is none


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """An interrupted run continues."""

    step: int  # updates taken so far
    message: str  # which run, from which step, and whether bit-identically, in a sentence


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """The loss of one update has arrived on the host."""

    step: int  # counted from 1
    loss: float  # mean over the step's samples
    grad_norm: float  # before clipping
    learning_rate: float = 0.0  # of this step, the largest of all groups
    # index in the dataset, quantile of the noise level (0 is clean, 1 noisy) and loss of each of the step's samples
    draws: tuple[tuple[int, float, float], ...] = ()
    noise_scale: float = 0.0  # in samples; 0 if unknown, as with one batch per step


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """The held-out images were evaluated."""

    step: int  # updates taken
    loss: float  # mean over the held-out images and their noise levels
    base_loss: float  # the same for the model without the LoRA
    # 95 % confidence interval of loss − base_loss, over images (fewer than five: over images and noise levels)
    low: float
    high: float
    best: bool  # whether this is the lowest loss so far
    best_step: int  # step of the lowest loss so far
    verdict: str  # interpretation of all validations so far, in a sentence


@dataclass(frozen=True, kw_only=True)
class Previewed(Event):
    """A preview was drawn from the LoRA as it would be saved."""

    step: int  # updates taken
    prompts: tuple[str, ...]  # one for each picture
    paths: tuple[str, ...]  # PNG files, one for each picture
    strength: float  # of the LoRA, 0 for the base model


@dataclass(frozen=True, kw_only=True)
class Drawing(Event):
    """Pictures of a preview are drawn. It is not logged."""

    done: int  # pictures so far
    total: int


@dataclass(frozen=True, kw_only=True)
class StateSaved(Event):
    """A run state was written."""

    step: int  # updates taken
    path: str


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """A step diverged: it is skipped, and training continues from an earlier snapshot at a lower rate."""

    step: int  # the diverged step, counted from 1
    to_step: int  # of the restored snapshot
    images: tuple[str, ...]  # names of the step's samples
    rate_factor: float  # of the learning rate, from here on
    message: str  # the above in a sentence


@dataclass(frozen=True, kw_only=True)
class Shrunk(Event):
    """Memory ran out: the step is repeated in smaller micro-batches, with the same result up to rounding."""

    step: int  # counted from 1
    micro_batch: int  # images per forward pass from here on
    checkpoint_depth: int  # of activation checkpointing from here on, 0 for none
    message: str  # the above in a sentence


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """The activation plan was selected by measurement."""

    activations: Activations  # as in `Runtime`, like `checkpoint_depth`
    checkpoint_depth: int
    needed_bytes: int  # estimated peak of a step
    budget_bytes: int  # available memory
    message: str  # the above in a sentence


@dataclass(frozen=True, kw_only=True)
class CaptionsPlanned(Event):
    """It was decided how the captions that are drawn are encoded."""

    captions: int | None  # encoded before training; None where the text encoders stay
    needed_bytes: int  # memory of these conditionings, or of the text encoders
    message: str  # the above in a sentence


@dataclass(frozen=True, kw_only=True)
class CaptionEncoded(Event):
    """A caption was encoded before training."""

    done: int  # captions so far
    total: int


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """A warning in one sentence; training continues."""

    message: str
    is_remark: bool = False  # whether it asks nothing of the user and is for the report alone


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """Training ended."""

    step: int  # updates taken in this run
    reason: Outcome


EventHandler = Callable[[Event], None]

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
"""The events of a run by name."""

MOST_LINE_BYTES = 2**22
"""Longer lines of a log are skipped: no event is that long."""

EVENTS_VERSION = 1
"""Version of the lines of `events.jsonl`, raised when older readers would misread them."""


def encoded(event: Event) -> str:
    """An event as a line of `events.jsonl`."""
    return json.dumps({"event": type(event).__name__, "version": EVENTS_VERSION, **dataclasses.asdict(event)})


def decoded(line: str) -> Event:
    """The event in a line of `events.jsonl`; unknown fields are ignored, and lines without a version are of the first.

    Raises:
        ValueError: the line is truncated, of an unknown kind or a later version, or holds implausible numbers.
    """
    try:
        found = json.loads(line)  # not `parse_foreign_json`: a loss may be NaN
        draws = _checked_draws(found.pop("draws", ()))
        found = _readable(found)
        kind = KINDS[found["event"]]
        if typed(found.get("version", 1), int) > EVENTS_VERSION:
            raise ValueError("it is of a later version")
        event = typed(found, kind)
        if isinstance(event, StepDone):
            event = dataclasses.replace(event, draws=draws)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"an event must have a known kind and its fields, got {line[:80]!r}") from error
    first_step = 1 if isinstance(event, StepDone) else 0
    if not (0 <= event.at < _LAST_SECOND and first_step <= getattr(event, "step", 1) <= _LAST_STEP):
        raise ValueError(f"an event must have a plausible time and step, got {line[:80]!r}")
    return event


_LAST_SECOND, _LAST_STEP = 1e11, 10_000_000


def _checked_draws(value: Any) -> tuple[tuple[int, float, float], ...]:
    """`StepDone.draws`, as `typed` checks them, which takes minutes for the millions of a long run."""
    draws = tuple((index, quantile, loss) for index, quantile, loss in value)
    for draw in draws:
        if type(draw[0]) is not int or not {type(draw[1]), type(draw[2])} <= {int, float}:
            raise ValueError("draws must be numbers")
        if any(type(number) is int and not -(2**63) <= number < 2**64 for number in draw):
            raise ValueError("draws must be numbers of 64 bits")
    return draws


def _readable(value: Any) -> Any:
    """A JSON value whose text is printable, as readers of events print it."""
    if isinstance(value, dict):
        return {name: _readable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(_readable, value))
    return printable(value) if isinstance(value, str) else value
