"""What a run's folder tells of it, read back: `run.json` as it is, `events.jsonl` as typed events.

A run that was killed ends in half a line, and a disk that was full leaves gaps; what cannot be read is counted and left
out, because the rest is worth having.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.training import events as event_module
from lorasmith.training.events import Event, RolledBack, RunFinished, RunStarted, StepDone

__all__ = ["RunHistory", "read_history"]

_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in vars(event_module).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}
_DRAWS = ([int, float, float], [int, int, float], [int, float, int], [int, int, int])  # JSON has one kind of number
_LAST_SECOND, _LAST_STEP = 1e11, 10_000_000
_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it.

    Attributes:
        folder: where it is.
        record: content of `run.json`.
        events: everything that happened, as it happened; a run that was resumed has several starts.
        unreadable: lines of `events.jsonl` that were left out.
    """

    folder: Path
    record: Mapping[str, Any]
    events: tuple[Event, ...]
    unreadable: int

    def of(self, kind: type[_E]) -> list[_E]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def steps(self) -> list[StepDone]:
        """The steps that led to where the run stands: what was rolled back or taken again counts once."""
        taken: dict[int, StepDone] = {}
        last = 0
        for event in self.events:
            if isinstance(event, StepDone):
                taken[event.step] = event
                last = event.step
            elif isinstance(event, RolledBack):
                last = min(last, event.to_step)
        return [taken[step] for step in sorted(taken) if step <= last]

    def reason(self) -> str | None:
        """Why the run ended (see `RunFinished`); None if it was killed or is still going on."""
        ends = [event for event in self.events if isinstance(event, (RunStarted, RunFinished))]
        return ends[-1].reason if ends and isinstance(ends[-1], RunFinished) else None

    def seconds(self) -> float:
        """Time spent in training, without the pauses before it was resumed."""
        total = start = latest = 0.0
        for event in self.events:
            if isinstance(event, RunStarted):
                total += max(0.0, latest - start)
                start = event.at
            start = start or event.at
            latest = event.at
        return total + max(0.0, latest - start)


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`.

    Raises:
        OptionError: there is no run in it.
        TrainingError: its `run.json` cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise OptionError(f"a run's folder has a run.json, which {folder} has not; name one such as runs/photos-001")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); without it nothing is known of the run, so restore it from a copy"
        ) from error
    lines = _lines(folder / "events.jsonl")
    events = [_event(line) for line in lines]
    return RunHistory(folder, record, tuple(one for one in events if one is not None), events.count(None))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return [line for line in text.split("\n") if line.strip()]


def _event(line: str) -> Event | None:
    """The event of a line; None where there is none. Events and fields that later versions add are left out."""
    try:
        found = json.loads(line)
        kind = _KINDS[found.pop("event")]
        known = {field.name: str(field.type) for field in dataclasses.fields(kind)}
        values: dict[str, Any] = {name: _frozen(value) for name, value in found.items() if name in known}
        event = kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    typed = all(_fits(getattr(event, name), annotation) for name, annotation in known.items())
    return event if typed and _plausible(event) else None


def _plausible(event: Event) -> bool:
    """Whether the numbers can be what they say; everything after relies on it."""
    step = getattr(event, "step", 1)
    draws = getattr(event, "draws", ())
    return (
        0 <= event.at < _LAST_SECOND
        and (1 if isinstance(event, StepDone) else 0) <= step <= _LAST_STEP
        and all(isinstance(draw, tuple) and list(map(type, draw)) in _DRAWS for draw in draws)
    )


def _fits(value: object, annotation: str) -> bool:
    """Whether a value is of the annotated kind, as far as JSON can tell; draws and names are looked at as tuples."""
    kinds = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,)}
    return isinstance(value, kinds.get(annotation, (tuple,)))


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
