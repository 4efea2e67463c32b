"""What is shown of a run: a reducer of its events. What draws it computes nothing."""

from __future__ import annotations

from collections import deque

from lorasmith.report.loss_plot import RecentLoss, RecentLosses
from lorasmith.runs.run_plan import ClassImageDrawn, EncodersHashed, ImageEncoded, ModelLoading
from lorasmith.training.events import (
    CaptionEncoded,
    CaptionsPlanned,
    Drawing,
    Event,
    Outcome,
    Planned,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    Shrunk,
    StepDone,
    Validated,
    Warned,
)

_TIMED_STEPS = 30  # steps whose times are averaged for the speed


class RunView:
    """The state of a run after the events that `take` has received.

    `activity` is the work between steps, such as `encoding captions` with (done, total). `steps` is 0 before the start.
    """

    def __init__(self) -> None:
        self.steps = self.step = 0
        self.activity: tuple[str, int, int] | None = None
        self.validation: Validated | None = None
        self.outcome: Outcome | None = None
        self._losses = RecentLosses()
        self._taken: list[tuple[int, float]] = []  # steps and losses
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._since: float | None = None

    def take(self, event: Event) -> None:
        self.activity = _activity(event)
        match event:
            case RunStarted():
                self.steps, self.outcome, self._since = event.steps, None, None
            case Resumed():
                self._go_back(event.step)
            case RolledBack():
                self._go_back(event.to_step)
            case StepDone():
                self._go_back(event.step - 1)
                self.step = event.step
                self._taken.append((event.step, event.loss))
                self._losses.add(event.loss)
                # Excludes the first step, which compiles and plans, and the time between steps.
                if self._since is not None:
                    self._times.append(max(0.0, event.at - self._since))
            case Validated():
                self.validation = event
            case RunFinished():
                self.outcome = event.reason
        if isinstance(event, StepDone) or self._since is not None:
            self._since = event.at

    @property
    def loss(self) -> RecentLoss:
        """The loss of recent steps; that of a single one mostly depends on the noise levels of its samples."""
        return self._losses.recent

    @property
    def held_out_change(self) -> float | None:
        """Change of the held-out loss by the LoRA, as a share of that without it; None before the first validation."""
        return None if self.validation is None else self.validation.loss / self.validation.base_loss - 1

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the last steps, without the time between them; None before the second one."""
        return sum(self._times) / len(self._times) if self._times else None

    @property
    def seconds_left(self) -> float | None:
        """None while the speed is unknown."""
        seconds = self.seconds_per_step
        return None if seconds is None else (self.steps - self.step) * seconds

    def _go_back(self, step: int) -> None:
        self.step = step
        if self._taken and self._taken[-1][0] > step:
            self._taken = [one for one in self._taken if one[0] <= step]
            self._losses = RecentLosses()
            for _, loss in self._taken:
                self._losses.add(loss)


def note_of(event: Event) -> tuple[str, str] | None:
    """The kind of an event's note, such as `Memory`, and its sentence; None if it is not shown as one."""
    match event:
        case Warned(is_remark=True):
            return None  # only in the report
        case Warned() | RolledBack() | Shrunk():
            return "Note", event.message
        case Planned():
            return "Memory", event.message
        case CaptionsPlanned():
            return "Captions", event.message
        case Resumed():
            return "Resumed", event.message
    return None


def _activity(event: Event) -> tuple[str, int, int] | None:
    match event:
        case ModelLoading():
            return f"loading {event.model}", 0, 0
        case ClassImageDrawn():
            return "drawing the class", event.done, event.total
        case EncodersHashed():
            return "hashing encoders", event.done, event.total
        case ImageEncoded():
            return "encoding images", event.done, event.total
        case CaptionEncoded():
            return "encoding captions", event.done, event.total
        case Drawing() if event.done < event.total:
            return "drawing previews", event.done, event.total
    return None
