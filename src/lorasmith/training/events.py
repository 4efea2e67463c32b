"""What a training run tells its audience: progress bars, plots, logs and sockets; the loop only reports."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CheckpointSaved",
    "Event",
    "EventHandler",
    "Planned",
    "Previewed",
    "Resumed",
    "RolledBack",
    "RunFinished",
    "RunStarted",
    "Shrunk",
    "StepDone",
    "Validated",
    "Warned",
    "as_json",
]


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
        folder: of the run, empty if there is none.
    """

    steps: int
    steps_before: int
    samples: int
    adapters: int
    parameters: int
    device: str
    dtype: str
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """A run that was broken off goes on.

    Attributes:
        step: updates that it had taken.
        message: what goes on, from where and how exactly, in a sentence.
    """

    step: int
    message: str


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """The loss of one update has reached the host.

    Attributes:
        step: counted from 1.
        loss: mean over the step's samples.
        grad_norm: length of the gradient before clipping.
        learning_rate: of this step, that of the largest group.
        draws: for each of the step's samples its index in the dataset, the quantile of its noise level (0 is clean, 1
            noisy) and its loss.
        noise_scale: batch size up to which a larger one would pay (gradient noise scale); 0 where it is not known,
            which takes two batches in a step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float = 0.0
    draws: tuple[tuple[int, float, float], ...] = ()
    noise_scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """The held-out images were looked at.

    Attributes:
        step: updates taken.
        loss: mean over the held-out images and their noise levels.
        base_loss: the same of the model without the LoRA.
        low, high: 95 % confidence interval of loss − base_loss, over images (over images and noise levels, if there are
            fewer than five images).
        best: whether this is the lowest loss so far.
        best_step: step of the lowest loss so far.
        verdict: what to make of it, in a sentence.
    """

    step: int
    loss: float
    base_loss: float
    low: float
    high: float
    best: bool
    best_step: int
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Previewed(Event):
    """Pictures were drawn from the LoRA as it is saved.

    Attributes:
        step: updates taken.
        prompts: one for each picture.
        paths: PNG files, one for each picture.
        strength: of the LoRA, 0 for the base model.
    """

    step: int
    prompts: tuple[str, ...]
    paths: tuple[str, ...]
    strength: float


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """The state of the run is on disk.

    Attributes:
        step: updates taken.
        path: the checkpoint.
    """

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """A step went wrong: its update was left out, and training goes on from an earlier state with a lower rate.

    Attributes:
        step: the step that went wrong, counted from 1.
        to_step: updates of the state gone back to.
        images: names of the step's samples.
        rate_factor: what the learning rate is multiplied by from now on.
        message: all of it, in a sentence.
    """

    step: int
    to_step: int
    images: tuple[str, ...]
    rate_factor: float
    message: str


@dataclass(frozen=True, kw_only=True)
class Shrunk(Event):
    """Memory ran out: the step is taken again in smaller pieces, with the same result to rounding.

    Attributes:
        step: counted from 1.
        micro_batch: images per forward pass from now on.
        checkpoint_depth: of gradient checkpointing from now on, 0 for none.
        message: all of it, in a sentence.
    """

    step: int
    micro_batch: int
    checkpoint_depth: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """How activations are kept was decided by a measurement.

    Attributes:
        activations, checkpoint_depth: as in `Recipe`.
        needed_bytes: estimated peak of a step.
        budget_bytes: what it had to fit.
        message: all of it, in a sentence.
    """

    activations: str
    checkpoint_depth: int
    needed_bytes: int
    budget_bytes: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the person should know, in one sentence; training goes on."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """No more steps will come.

    Attributes:
        step: updates taken in this run.
        reason: `finished`, `stopped` (early, by validation), `cancelled` or `failed`.
    """

    step: int
    reason: str


EventHandler = Callable[[Event], None]


def as_json(event: Event) -> dict[str, Any]:
    """An event as a line of `events.jsonl`."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}
