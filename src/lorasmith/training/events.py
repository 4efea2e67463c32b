"""Events that a training run reports to its handlers: progress bars, plots, logs and sockets."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from lorasmith.core.choices import Activations, AttentionKernel
from lorasmith.core.printable import printable
from lorasmith.core.typed_json import typed


class Outcome(StrEnum):
    """Why a run ended; values are those in files."""

    FINISHED = "finished"
    """All steps were taken."""
    STOPPED = "stopped"
    """Early stopping: no improvement for `patience` validations or previews."""
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

    at: Annotated[float, "seconds since the epoch"] = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to take its first step."""

    steps: Annotated[int, "planned updates"]
    steps_before: Annotated[int, "updates of the LoRA that is continued"]
    samples: Annotated[int, "samples in the dataset"]
    adapters: Annotated[int, "adapted layers"]
    parameters: Annotated[int, "number of trained parameters"]
    device: Annotated[str, "of the frozen model"]
    dtype: Annotated[str, "of its weights"]
    folder: Annotated[str, "of the run, empty if there is none"] = ""


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """An interrupted run continues."""

    step: Annotated[int, "updates taken so far"]
    message: Annotated[str, "which run, from which step, and whether bit-identically, in a sentence"]


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """The loss of one update has arrived on the host."""

    step: Annotated[int, "counted from 1"]
    loss: Annotated[float, "mean over the step's samples"]
    grad_norm: Annotated[float, "norm of the gradient before clipping"]
    learning_rate: Annotated[float, "of this step, the largest of all groups"] = 0.0
    draws: Annotated[
        tuple[tuple[int, float, float], ...],
        "for each of the step's samples its index in the dataset, the quantile of its noise level (0 "
        "is clean, 1 noisy) and its loss",
    ] = ()
    noise_scale: Annotated[float, "gradient noise scale in samples; 0 if unknown, as with one batch per step"] = 0.0
    memory_bytes: Annotated[
        int, "memory of the process: allocated on its GPU at the peak of the run, or resident on the CPU; 0 if unknown"
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """The held-out images were evaluated."""

    step: Annotated[int, "updates taken"]
    loss: Annotated[float, "mean over the held-out images and their noise levels"]
    base_loss: Annotated[float, "the same for the model without the LoRA"]
    low: Annotated[
        float,
        "lower end of the 95 % confidence interval of loss − base_loss, over images (over images and "
        "noise levels, if there are fewer than five images)",
    ]
    high: Annotated[
        float,
        "upper end of that interval",
    ]
    best: Annotated[bool, "whether this is the lowest loss so far"]
    best_step: Annotated[int, "step of the lowest loss so far"]
    verdict: Annotated[str, "interpretation of all validations so far, in a sentence"]


@dataclass(frozen=True, kw_only=True)
class Previewed(Event):
    """A preview was drawn from the LoRA as it would be saved."""

    step: Annotated[int, "updates taken"]
    prompts: Annotated[tuple[str, ...], "one for each picture"]
    paths: Annotated[tuple[str, ...], "PNG files, one for each picture"]
    strength: Annotated[float, "of the LoRA, 0 for the base model"]
    sampling_steps: Annotated[int, "of each picture; 0 in logs of earlier versions"] = 0


@dataclass(frozen=True, kw_only=True)
class LikenessMeasured(Event):
    """A preview was compared with the training images, by image features."""

    step: Annotated[int, "updates taken"]
    likeness: Annotated[float, "mean cosine of the pictures with the training images, 1 for equal ones"]
    own: Annotated[float | None, "mean cosine of two of the training images; null for a single one"]
    adherence: Annotated[
        float | None,
        "how well prompts are followed: 1 as by the base model, 0 not at all; null where it is not watched",
    ] = None
    score: Annotated[
        float, "likeness, from that of the base model at 0 to that of the training images at 1, times adherence"
    ] = 0.0


@dataclass(frozen=True, kw_only=True)
class Drawing(Event):
    """Pictures of a preview are drawn. It is not logged."""

    done: Annotated[int, "pictures drawn so far"]
    total: Annotated[int, "pictures of this preview"]


@dataclass(frozen=True, kw_only=True)
class Sketched(Event):
    """The first picture of a preview, small and as it is so far. It is not logged."""

    picture: Annotated[str, "as a data URL"]


@dataclass(frozen=True, kw_only=True)
class PromptDrawn(Event):
    """A prompt that was asked for while the run trains was drawn, without and with the LoRA."""

    id: Annotated[str, "of the request"]
    step: Annotated[int, "updates taken"]
    lora: Annotated[str, "name of the file that was drawn with; empty for the weights after this step"]
    prompt: Annotated[str, "as it was asked for"]
    strength: Annotated[float, "of the LoRA"]
    seed: Annotated[int, "of the noise"]
    paths: Annotated[tuple[str, ...], "the picture without the LoRA, and that with it; empty if it failed"]
    note: Annotated[str, "parts of the LoRA that do not apply, in a sentence"] = ""
    error: Annotated[str, "why it failed, in a sentence"] = ""


@dataclass(frozen=True, kw_only=True)
class LoraSaved(Event):
    """A LoRA was saved on the way, in a file that is kept."""

    step: Annotated[int, "updates taken"]
    path: Annotated[str, "the file"]


@dataclass(frozen=True, kw_only=True)
class StateSaved(Event):
    """A run state was written."""

    step: Annotated[int, "updates taken"]
    path: Annotated[str, "the file"]


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event):
    """A step diverged: it is skipped, and training continues from an earlier snapshot at a lower rate."""

    step: Annotated[int, "the diverged step, counted from 1"]
    to_step: Annotated[int, "step of the restored snapshot"]
    images: Annotated[tuple[str, ...], "names of the samples whose own loss was at fault"]
    rate_factor: Annotated[float, "factor of the learning rate from here on"]
    message: Annotated[str, "the above in a sentence"]
    layers: Annotated[tuple[str, ...], "paths of those whose gradient was not finite, although the loss was"] = ()


@dataclass(frozen=True, kw_only=True)
class Shrunk(Event):
    """Memory ran out: the step is repeated in smaller micro-batches, with the same result up to rounding."""

    step: Annotated[int, "counted from 1"]
    micro_batch: Annotated[int, "images per forward pass from here on"]
    checkpoint_depth: Annotated[int, "depth of activation checkpointing from here on, 0 for none"]
    message: Annotated[str, "the above in a sentence"]


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """The activation plan was selected by measurement."""

    activations: Annotated[Activations, "as in `Runtime`"]
    checkpoint_depth: Annotated[int, "as in `Runtime`"]
    kept_blocks: Annotated[int, "number of the last blocks at that depth that are not recomputed"] = 1
    needed_bytes: Annotated[int, "estimated peak of a step"]
    budget_bytes: Annotated[int, "available memory"]
    message: Annotated[str, "the above in a sentence"]


@dataclass(frozen=True, kw_only=True)
class AttentionPlanned(Event):
    """The kernel of attention was selected by its time."""

    kernel: Annotated[AttentionKernel, "as in `Runtime`"]
    message: Annotated[str, "the above in a sentence"]


@dataclass(frozen=True, kw_only=True)
class Autotuned(Event):
    """The way of steps was selected by its time."""

    seconds: Annotated[dict[str, float], "of a step, by way"]
    message: Annotated[str, "which was chosen, and the above, in a sentence"]


@dataclass(frozen=True, kw_only=True)
class CaptionsPlanned(Event):
    """It was decided how the captions that are drawn are encoded."""

    captions: Annotated[
        int | None, "number of captions that are encoded before training; None where the text encoders stay"
    ]
    needed_bytes: Annotated[int, "memory of these conditionings, or of the text encoders"]
    message: Annotated[str, "the above in a sentence"]


@dataclass(frozen=True, kw_only=True)
class CaptionEncoded(Event):
    """A caption was encoded before training."""

    done: Annotated[int, "captions encoded so far"]
    total: Annotated[int, "captions that are encoded"]


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """A warning in one sentence; training continues."""

    message: Annotated[str, "the sentence"]
    is_remark: Annotated[bool, "whether it asks nothing of the user and is for the report alone"] = False


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """Training ended."""

    step: Annotated[int, "updates taken in this run"]
    reason: Annotated[Outcome, "why it ended"]


EventHandler = Callable[[Event], None]

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
"""The events of a run by name."""


@dataclass(frozen=True, kw_only=True)
class EarlierEvents(Event):
    """The log of a run that is resumed. It is not logged, and no event of that log.

    Attributes:
        events: without the draws of steps.
    """

    events: tuple[Event, ...]


MOST_LINE_BYTES = 2**22
"""Longer lines of a log are skipped: no event is that long."""

EVENTS_VERSION = 1
"""Version of the lines of `events.jsonl`, raised when older readers would misread them."""


def encoded(event: Event) -> str:
    """An event as a line of `events.jsonl`."""
    return json.dumps({"event": type(event).__name__, "version": EVENTS_VERSION, **dataclasses.asdict(event)})


def decoded(line: bytes) -> Event:
    """The event in a line of `events.jsonl`; unknown fields are ignored, and lines without a version are of the first.

    Raises:
        ValueError: the line is truncated, of an unknown kind or a later version, or holds implausible numbers.
    """
    if line.startswith(_STEP_START) and (step := _decoded_step(line)) is not None:
        return step
    text = line.decode(errors="replace")
    try:
        content = json.loads(text)  # not `parse_foreign_json`: a loss may be NaN
        content = _readable(content)
        kind = KINDS[content["event"]]
        if typed(content.get("version", 1), int) > EVENTS_VERSION:
            raise ValueError("it is of a later version")
        event = typed(content, kind)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"an event must have a known kind and its fields, got {text[:80]!r}") from error
    first_step = 1 if isinstance(event, StepDone) else 0
    if not (0 <= event.at < _LAST_SECOND and first_step <= getattr(event, "step", 1) <= _LAST_STEP):
        raise ValueError(f"an event must have a plausible time and step, got {text[:80]!r}")
    return event


_LAST_SECOND, _LAST_STEP = 1e11, 10_000_000
_STEP_START = f'{{"event": "StepDone", "version": {EVENTS_VERSION}, '.encode()  # as `encoded` writes it


def _decoded_step(line: bytes) -> StepDone | None:
    """The step in a line, ten times as fast, as logs have up to millions; None where the slow way has to decide."""
    import msgspec

    try:
        event = _steps()(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, SystemError):
        return None
    integers = (event.memory_bytes, *(draw[0] for draw in event.draws))
    is_plausible = 0 <= event.at < _LAST_SECOND and 1 <= event.step <= _LAST_STEP
    return event if is_plausible and all(-(2**63) <= integer < 2**63 for integer in integers) else None


@functools.cache
def _steps() -> Callable[[bytes], StepDone]:
    import msgspec

    return msgspec.json.Decoder(StepDone).decode


def _readable(value: Any) -> Any:
    """A JSON value whose text is printable, as readers of events print it."""
    if isinstance(value, dict):
        return {name: _readable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(_readable, value))
    return printable(value) if isinstance(value, str) else value
