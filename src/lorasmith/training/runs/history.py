"""Reader of run folders: `run.json` as a typed record, `events.jsonl` as typed events.

A killed run may end in an incomplete line, and a full disk leaves gaps; unreadable lines are counted and skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import RUN_LOG, RUN_RECORD
from lorasmith.training.events import Event, RolledBack, RunFinished, RunStarted, StepDone, decoded
from lorasmith.training.outcome import Outcome
from lorasmith.training.runs.records import RunRecord, parsed_record

__all__ = ["EVENTS", "RECORD", "RunHistory", "read_history", "read_record"]

RECORD, EVENTS = RUN_RECORD, RUN_LOG

_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True)
class RunHistory:
    """The record and events of a run.

    Attributes:
        folder: of the run.
        record: content of `run.json`.
        events: all events in order; a resumed run has several starts.
        unreadable: number of skipped lines of `events.jsonl`.
    """

    folder: Path
    record: RunRecord
    events: tuple[Event, ...]
    unreadable: int

    def of(self, kind: type[_E]) -> list[_E]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def steps(self) -> list[StepDone]:
        """The steps that led to the current state, without those rolled back or repeated."""
        taken: dict[int, StepDone] = {}
        last = 0
        for event in self.events:
            if isinstance(event, StepDone):
                taken[event.step] = event
                last = event.step
            elif isinstance(event, RolledBack):
                last = min(last, event.to_step)
        return [taken[step] for step in sorted(taken) if step <= last]

    @property
    def outcome(self) -> Outcome | None:
        """Why the run ended; None if it was killed or is running."""
        ends = [event for event in self.events if isinstance(event, (RunStarted, RunFinished))]
        return ends[-1].reason if ends and isinstance(ends[-1], RunFinished) else None

    def seconds(self) -> float:
        """Training time in seconds, without pauses before resumptions."""
        total = start = latest = 0.0
        for event in self.events:
            if isinstance(event, RunStarted):
                total += max(0.0, latest - start)
                start = event.at
            start = start or event.at
            latest = event.at
        return total + max(0.0, latest - start)


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`. Raises OptionError and TrainingError, as `read_record` does."""
    record = read_record(folder)
    events: list[Event] = []
    unreadable = 0
    for line in _lines(folder / EVENTS):
        try:
            events.append(decoded(line))
        except ValueError:
            unreadable += 1
    return RunHistory(folder, record, tuple(events), unreadable)


def read_record(folder: Path) -> RunRecord:
    """Content of a run's `run.json`.

    Raises:
        OptionError: there is no run in the folder.
        TrainingError: the file cannot be read, or is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise OptionError(f"a run folder must contain run.json, got {folder}; name one such as runs/photos-001")
    try:
        return parsed_record(read_regular(path))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}), which is needed to identify the run; restore it from a copy"
        ) from error


def _lines(path: Path) -> list[str]:
    try:
        text = read_regular(path).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return [line for line in text.split("\n") if line.strip()]
