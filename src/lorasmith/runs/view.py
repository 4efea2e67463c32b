"""What is shown of a run: a reducer of its events.

Terminal, notebooks, nodes, the report, the page and the editor draw a `RunView`, or its JSON, and compute nothing. A
number that all of them show is an entry of `METRICS`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PureWindowsPath
from statistics import median_low
from typing import Any, NamedTuple

from lorasmith.core.folders import TRIED
from lorasmith.core.printable import count_text, memory_text, time_text
from lorasmith.report.loss_plot import RecentLoss, RecentLosses
from lorasmith.runs.run_plan import (
    ClassImageDrawn,
    EncodersHashed,
    ImageEncoded,
    ImagesFound,
    ModelLoading,
    RunPlanned,
    captions_used,
)
from lorasmith.training.events import (
    AttentionPlanned,
    Autotuned,
    CaptionEncoded,
    CaptionsPlanned,
    Drawing,
    EarlierEvents,
    Event,
    LikenessMeasured,
    LoraSaved,
    Outcome,
    Planned,
    Previewed,
    PromptDrawn,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    Shrunk,
    Sketched,
    StepDone,
    Validated,
    Warned,
)

_TIMED_STEPS = 30  # steps whose times are averaged for the speed
_OUTLIER = 10  # times the usual step: the clock was set, the computer slept, or a step compiled
_SLEPT_S = 600  # from which such a step does not count as training time either
_POINTS = 500  # of a curve in JSON, so that it stays below 20 kB
_MOST_POINTS = 200_000  # that are kept; of a longer run every second, fourth … step, and the last
_MOST_NOTES, _SENT_NOTES, _MOST_PREVIEWS, _MOST_LETTERS = 1000, 100, 1000, 2000


@dataclass(frozen=True)
class Metric:
    """A number of a run; `text` is with its unit, `label` its name in a table, `line` both for a line of several."""

    name: str
    label: str
    value: float
    text: str
    unit: str
    line: str


@dataclass(frozen=True)
class Note:
    """A sentence about the run; a `Remark` asks nothing of the user and is for the report."""

    kind: str
    text: str
    step: int | None = None  # None if it belongs to no step
    is_warning: bool = False


class Point(NamedTuple):
    """A step of the curve; `mean` is the loss that was shown after it."""

    step: int
    loss: float
    mean: float
    rate: float


class RunView:
    """The state of a run after the events that `take` has received.

    `activity` is the work between steps, such as `encoding captions` with (done, total). `steps` is 0 before the start.
    `seconds` is the training time, without pauses before resumptions and jumps of the clock.
    """

    def __init__(self) -> None:
        self.steps = self.step = 0
        self.folder = ""
        self.activity: tuple[str, int, int] | None = None
        self.last: StepDone | None = None
        self.points: list[Point] = []
        self.validation: Validated | None = None
        self.outcome: Outcome | None = None
        self.notes: dict[Note, float] = {}  # with the time of each; a resumed run repeats some
        self.previews: dict[tuple[int, float], Previewed] = {}  # by step and strength
        self.saves: dict[int, LoraSaved] = {}  # LoRAs that are kept, by step
        self.drawn: dict[str, PromptDrawn] = {}  # what was asked for while it trains, by request
        self.sketch = ""  # data URL of the picture that is drawn, as it is so far
        self.likeness: LikenessMeasured | None = None
        self.faults: list[int] = []  # steps that were rolled back
        self._preparation: dict[str, str] = {}
        self._validations: dict[int, Validated] = {}  # by step: a resumed run may repeat some
        self._likenesses: dict[int, LikenessMeasured] = {}
        self._every = 1
        self._losses = RecentLosses()
        self._status = "Waiting for the model and the images."
        self._times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._drawing_times: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._since: float | None = None  # of the last event, once a step was taken
        self._latest: float | None = None  # time of the last event of this attempt
        self.seconds = 0.0

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunView:
        view = cls()
        for event in events:
            view.take(event)
        return view

    def take(self, event: Event) -> None:
        if isinstance(event, EarlierEvents):
            for member in event.events:
                self.take(member)
            return
        if isinstance(event, Sketched):
            self.sketch = event.picture
            return
        self.sketch = ""
        if isinstance(event, StepDone):  # first, as logs have up to millions
            self.activity = None
            self._take_step(event)
            if self.outcome is None:
                self._status = "Training."
            self._since = event.at
            return
        self.activity = _activity(event)
        if (prepared := _preparation(event)) is not None:
            self._preparation[type(event).__name__] = prepared
        if (note := note_of(event)) is not None:
            self.notes.setdefault(note, event.at)
            _limit(self.notes, _MOST_NOTES)
        match event:
            case RunStarted():
                self._latest = event.at
                self.steps, self.folder, self.outcome, self._since = event.steps, event.folder, None, None
                self._times.clear()
            case Resumed():
                self._go_back(event.step)
            case RolledBack():
                self.faults.append(event.step)
                self._go_back(event.to_step)
            case Validated():
                self.validation = self._validations[event.step] = event
            case LikenessMeasured():
                self.likeness = self._likenesses[event.step] = event
            case Previewed():
                self.previews[event.step, event.strength] = event
                if event.sampling_steps and event.paths and self._latest is not None:
                    drawn = event.sampling_steps * len(event.paths)
                    self._drawing_times.append(max(0.0, event.at - self._latest) / drawn)
                _limit(self.previews, _MOST_PREVIEWS)
            case LoraSaved():
                self.saves[event.step] = event
                _limit(self.saves, _MOST_PREVIEWS)
            case PromptDrawn():
                self.drawn[event.id] = event
                _limit(self.drawn, _SENT_NOTES)
            case RunFinished():
                self.outcome = event.reason
        self._status = self._status_after(event, note)
        if self._since is not None:
            self._since = event.at
        self._pass_time(event.at)

    @property
    def loss(self) -> RecentLoss:
        """The loss of recent steps; that of a single one mostly depends on the noise levels of its samples."""
        return self._losses.recent

    @property
    def validations(self) -> list[Validated]:
        """The last validation of each step, in order."""
        return [self._validations[step] for step in sorted(self._validations)]

    @property
    def likenesses(self) -> list[LikenessMeasured]:
        """The last comparison of previews with the training images of each step, in order."""
        return [self._likenesses[step] for step in sorted(self._likenesses)]

    @property
    def best(self) -> Validated | None:
        """The validation with the lowest loss."""
        return min(
            (validation for validation in self.validations if math.isfinite(validation.loss)),
            key=lambda validation: validation.loss,
            default=None,
        )

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the last steps, without the time between them and without outliers; None before the second one."""
        if not self._times:
            return None
        most = _OUTLIER * median_low(self._times)
        times = [time for time in self._times if time <= most]
        return sum(times) / len(times)

    @property
    def sampling_step_s(self) -> float | None:
        """Seconds of a sampling step of a picture, by the previews; None if none was drawn."""
        return median_low(self._drawing_times) if self._drawing_times else None

    @property
    def seconds_left(self) -> float | None:
        """None while the speed is unknown, and after the end."""
        seconds = self.seconds_per_step
        return None if seconds is None or self.outcome is not None else (self.steps - self.step) * seconds

    @property
    def metrics(self) -> list[Metric]:
        """The numbers that are known."""
        return [fact for metric in METRICS if (fact := metric(self)) is not None]

    @property
    def line(self) -> str:
        """All metrics in a line; during other work this and the time left."""
        if self.activity is None:
            return " · ".join(metric.line for metric in self.metrics)
        left = _time_left(self)
        return _activity_text(self.activity) + (f" · {left.line}" if left is not None else "")

    @property
    def verdict(self) -> str:
        """That of the last validation, or a sentence on the training loss; empty before the first step."""
        if self.validation is not None:
            return self.validation.verdict
        losses = [point.loss for point in self.points if math.isfinite(point.loss)]
        if not losses:
            return ""
        if len(losses) < 20:
            return "too few steps to see a trend"
        last = self.loss
        early = losses[: max(1, last.steps // self._every)]
        first = sum(early) / len(early)
        return (
            f"the training loss {'fell' if last.mean < first else 'rose'} from {number_text(first)} to "
            f"{number_text(last.mean)} (means of the first and the last {last.steps:,} steps)"
        )

    def prompts_drawn(self) -> list[dict[str, Any]]:
        """What was asked for while it trains, as JSON values."""
        return [
            {
                "id": drawing.id,
                "prompt": drawing.prompt[:_MOST_LETTERS],
                "strength": drawing.strength,
                "seed": drawing.seed,
                "lora": drawing.lora,
                "pictures": [f"{TRIED}/{_name(path)}" for path in drawing.paths],
                "step": drawing.step,
                "note": drawing.note[:_MOST_LETTERS],
                "error": drawing.error[:_MOST_LETTERS],
            }
            for drawing in self.drawn.values()
        ]

    def to_json(self) -> dict[str, Any]:
        """All that is shown, as finite JSON values of bounded size: of long lists a part, evenly spaced."""
        best = self.best
        return {
            "run": self.folder,
            "step": self.step,
            "steps": self.steps,
            "status": self._status,
            "preparation": list(self._preparation.values()),
            "metrics": [asdict(metric) for metric in self.metrics],
            "curve": [[point.step, _finite(point.loss), _finite(point.mean)] for point in _thinned(self.points)],
            "validations": [
                {**_numbers(point, "loss", "base_loss"), "best": point is best} for point in _thinned(self.validations)
            ],
            "likenesses": [_numbers(point, "likeness", "own", "adherence") for point in _thinned(self.likenesses)],
            "best_step": None if best is None else best.step,
            "verdict": self.verdict,
            "previews": [
                {
                    "step": preview.step,
                    "strength": _finite(preview.strength),
                    "prompt": prompt[:_MOST_LETTERS],
                    "number": number,
                    "file": preview_file(path),
                }
                for preview in self.previews.values()
                for number, (prompt, path) in enumerate(zip(preview.prompts, preview.paths, strict=False), start=1)
            ][-_MOST_PREVIEWS:],
            "sketch": self.sketch,
            "saves": [{"step": step, "file": _name(save.path)} for step, save in sorted(self.saves.items())],
            "drawn": self.prompts_drawn(),
            "notes": [
                {**asdict(note), "text": note.text[:_MOST_LETTERS], "at": at}
                for note, at in sorted(self.notes.items(), key=lambda note: note[1])[-_SENT_NOTES:]
            ],
            "outcome": self.outcome,
        }

    def _take_step(self, event: StepDone) -> None:
        self._go_back(event.step - 1)
        self.step, self.last = event.step, event
        self._losses.add(event.step, event.loss)
        if self._every > 1 and self.points and self.points[-1].step % self._every:
            self.points.pop()
        self.points.append(Point(event.step, event.loss, self._losses.recent.mean, event.learning_rate))
        if len(self.points) > _MOST_POINTS:
            self._every *= 2
            self.points = [point for point in self.points if point.step % self._every == 0 or point.step == event.step]
        # Excludes the first step, which compiles and plans, and the time between steps.
        time = None if self._since is None else event.at - self._since
        self._pass_time(event.at, step_s=time or 0.0)
        if time is not None and time >= 0:
            self._times.append(time)

    def _pass_time(self, at: float, *, step_s: float = 0.0) -> None:
        """Add the time since the last event, unless the clock was set back, or forward in a step of `step_s`."""
        if self._latest is None:
            return
        slept = step_s > _SLEPT_S and bool(self._times) and step_s > _OUTLIER * median_low(self._times)
        if at > self._latest and not slept:
            self.seconds += at - self._latest
        self._latest = at

    def _go_back(self, step: int) -> None:
        self.step = step
        if self.points and self.points[-1].step > step:
            self.points = [point for point in self.points if point.step <= step]
            self._losses = RecentLosses()
            for point in self.points:
                self._losses.add(point.step, point.loss)

    def _status_after(self, event: Event, note: Note | None) -> str:
        if self.outcome is not None:
            return _ENDS[self.outcome]
        if self.activity is not None:
            return _sentence(_activity_text(self.activity))
        if note is not None and note.kind != "Remark":
            return note.text
        return "Training." if isinstance(event, RunStarted) else self._status


def number_text(value: float) -> str:
    """Four significant digits."""
    return f"{value:#.4g}".rstrip(".")


def _loss(view: RunView) -> Metric | None:
    loss = view.loss
    if not math.isfinite(loss.mean):
        return None
    text = number_text(loss.mean)
    return Metric("loss", loss.label, loss.mean, text, "", f"loss {text}")


def _held_out(view: RunView) -> Metric | None:
    last = view.validation
    if last is None or not math.isfinite(last.loss):
        return None
    text = number_text(last.loss)
    if not 0 < last.base_loss < math.inf:
        return Metric("held_out", "held-out loss", last.loss, text, "", f"held out {text}")
    change = f"{100 * (last.loss / last.base_loss - 1):+.1f} %"
    return Metric("held_out", "held-out loss", last.loss, f"{text} ({change})", "", f"held out {change}")


def _likeness(view: RunView) -> Metric | None:
    last = view.likeness
    if last is None or not math.isfinite(last.likeness):
        return None
    own = "" if last.own is None else f", images to one another {last.own:.2f}"
    follows = "" if last.adherence is None else f", prompts followed {last.adherence:.2f}"
    text = f"{last.likeness:.2f}"
    return Metric(
        "likeness", f"likeness of previews{follows}{own}", last.likeness, text, "", f"likeness {text}{follows}"
    )


def _speed(view: RunView) -> Metric | None:
    seconds = view.seconds_per_step
    if not seconds:
        return None
    text = f"{seconds:.3g} s/step"
    return Metric("speed", "speed", seconds, text, "s/step", text)


def _time_left(view: RunView) -> Metric | None:
    left = view.seconds_left
    if left is None:
        return None
    text = time_text(left)
    return Metric("time_left", "time left", left, text, "s", f"{text} left")


def _memory(view: RunView) -> Metric | None:
    if view.last is None or not view.last.memory_bytes:
        return None
    text = memory_text(view.last.memory_bytes)
    return Metric("memory", "memory", view.last.memory_bytes, text, "bytes", text)


METRICS: Sequence[Callable[[RunView], Metric | None]] = (_loss, _held_out, _likeness, _speed, _time_left, _memory)
"""What is shown of a run in numbers, in this order; each gives None while it is unknown."""


class ViewPublisher:
    """Receives events, and publishes their view as JSON: at once, but progress of one kind at most once a second."""

    def __init__(self, publish: Callable[[dict[str, Any]], object]) -> None:
        self.view = RunView()
        self._publish = publish
        self._progress: Event | None = None  # the last that was published

    def __call__(self, event: Event) -> None:
        self.view.take(event)
        if isinstance(event, StepDone) or self.view.activity is not None:
            last = self._progress
            if type(event) is type(last) and 0 <= event.at - last.at < 1:
                return
            self._progress = event
        self._publish(self.view.to_json())


def note_of(event: Event) -> Note | None:
    """The note that an event is."""
    match event:
        case Warned():
            return Note("Remark", event.message) if event.is_remark else Note("Note", event.message, is_warning=True)
        case RolledBack():
            return Note("Rolled back", event.message, event.step, is_warning=True)
        case Shrunk():
            return Note("Out of memory", event.message, event.step, is_warning=True)
        case Planned() | AttentionPlanned() | Autotuned() | CaptionsPlanned():
            return Note(_PLANNED[type(event)], event.message)
        case Resumed():
            return Note("Resumed", event.message, event.step)
    return None


_PLANNED: dict[type[Event], str] = {
    Planned: "Memory", AttentionPlanned: "Attention", Autotuned: "Autotune", CaptionsPlanned: "Captions"
}  # fmt: skip


def preview_file(path: str) -> str:
    """The path of a preview in its run's folder. Only its name is taken from the log, as the folder may have moved."""
    return f"samples/{_name(path)}"


def _name(path: str) -> str:
    return PureWindowsPath(path).name


_ENDS = {
    Outcome.FINISHED: "Finished.",
    Outcome.STOPPED: "Stopped early.",
    Outcome.CANCELLED: "Cancelled; running again resumes it.",
    Outcome.FAILED: "Failed.",
}


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


def _activity_text(activity: tuple[str, int, int]) -> str:
    what, done, total = activity
    return f"{what}, {done:,} of {total:,}" if total else what


def _preparation(event: Event) -> str | None:
    """What an event before the first step says."""
    match event:
        case ImagesFound():
            images = event.scan.images
            used = captions_used(images, event.trigger)
            return f"{count_text(len(images), 'photo')} found" + (f"; captions: {used}" if used else "")
        case ModelLoading():
            return f"Loading {event.model}…"
        case RunPlanned():
            return f"{count_text(event.plan.config.steps, 'step')} planned"
        case ImageEncoded():
            earlier = f", {event.cached:,} of them earlier" if event.cached else ""
            return f"Photos prepared: {event.done:,} of {event.total:,}{earlier}"
        case CaptionEncoded():
            return f"Captions prepared: {event.done:,} of {event.total:,}"
        case ClassImageDrawn():
            return f"Pictures of the class drawn: {event.done:,} of {event.total:,}"
    return None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _finite(value: float | None) -> float | None:
    """For a curve: six digits, None for NaN and infinity."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _numbers(event: Validated | LikenessMeasured, *names: str) -> dict[str, Any]:
    return {"step": event.step, **{name: _finite(getattr(event, name)) for name in names}}


def _thinned(items: list[Any]) -> list[Any]:
    """At most `_POINTS` items: every n-th one from the first on, so that few change when one is added, and the last."""
    every = -(-len(items) // _POINTS)
    return items if every <= 1 else [*items[:-1:every], items[-1]]


def _limit(items: dict[Any, Any], most: int) -> None:
    while len(items) > most:
        del items[next(iter(items))]
