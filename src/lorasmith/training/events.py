"""What a training run tells its audience: progress bars, plots, logs and sockets; the loop only reports."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_origin, get_type_hints

from lorasmith.core.choices import Activations
from lorasmith.training.outcome import Outcome

__all__ = [
    "Event",
    "EventHandler",
    "Planned",
    "Previewed",
    "Resumed",
    "RolledBack",
    "RunFinished",
    "RunStarted",
    "Shrunk",
    "StateSaved",
    "StepDone",
    "Validated",
    "Warned",
    "decoded",
    "encoded",
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
class StateSaved(Event):
    """The state of the run is on disk.

    Attributes:
        step: updates taken.
        path: the file.
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
        activations, checkpoint_depth: as in `Runtime`.
        needed_bytes: estimated peak of a step.
        budget_bytes: what it had to fit.
        message: all of it, in a sentence.
    """

    activations: Activations
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
        reason: why.
    """

    step: int
    reason: Outcome


EventHandler = Callable[[Event], None]


def encoded(event: Event) -> str:
    """An event as a line of `events.jsonl`."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def decoded(line: str) -> Event:
    """The event of a line; fields that later versions add are left out.

    Raises:
        ValueError: the line is cut short, of a kind that is not known, or its numbers cannot be what they say.
    """
    try:
        found = json.loads(line)
        name = found.pop("event")
        kinds = _field_kinds(name)
        fields: dict[str, Any] = {key: _value(found[key], kinds[key]) for key in found.keys() & kinds.keys()}
        event = _KINDS[name](**fields)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"an event must have a known kind and its fields, got {line[:80]!r}") from error
    if not _plausible(event):
        raise ValueError(f"an event must have a time, steps and draws that can be, got {line[:80]!r}")
    return event


_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
_DRAWS = ([int, float, float], [int, int, float], [int, float, int], [int, int, int])  # JSON has one kind of number
_JSON_KINDS: dict[Any, Any] = {float: (int, float), int: int, bool: bool}
_LAST_SECOND, _LAST_STEP = 1e11, 10_000_000


@functools.cache
def _field_kinds(name: str) -> dict[str, Any]:
    return get_type_hints(_KINDS[name])


def _value(value: Any, hint: Any) -> object:
    """A value of JSON as a field's type has it. Raises ValueError and TypeError if it is of another kind."""
    if hint is Outcome:
        return Outcome(value)
    kinds = tuple if get_origin(hint) is tuple else _JSON_KINDS.get(hint, str)
    if not isinstance(frozen := _frozen(value), kinds):
        raise TypeError
    return frozen


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _plausible(event: Event) -> bool:
    """Whether the numbers can be what they say; everything after relies on it."""
    step = getattr(event, "step", 1)
    draws = getattr(event, "draws", ())
    return (
        0 <= event.at < _LAST_SECOND
        and (1 if isinstance(event, StepDone) else 0) <= step <= _LAST_STEP
        and all(isinstance(draw, tuple) and list(map(type, draw)) in _DRAWS for draw in draws)
    )
