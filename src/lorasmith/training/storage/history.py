"""Reader of run folders: `run.json` as a typed record, `events.jsonl` as typed events.

A killed run may end in an incomplete line, and a full disk leaves gaps; unreadable lines are counted and skipped. A log
is read line by line: it may have gigabytes, mostly draws, which are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import open_regular, read_regular
from lorasmith.core.folders import RUN_LOG, RUN_RECORD
from lorasmith.training.events import MOST_LINE_BYTES, Event, RunFinished, RunStarted, StepDone, decoded
from lorasmith.training.outcome import Outcome
from lorasmith.training.storage.records import RunRecord, parsed_record

RECORD, EVENTS = RUN_RECORD, RUN_LOG

MOST_EVENTS = 2_000_000
"""Events that are kept; the longest run has some hundred thousand."""

_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True)
class RunHistory:
    """The record and events of a run."""

    folder: Path
    record: RunRecord
    events: tuple[Event, ...]  # in order, steps without their draws; a resumed run has several starts
    unreadable: int  # number of skipped lines of `events.jsonl`

    def of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self.events if isinstance(event, kind)]

    def draws(self) -> Iterator[tuple[int, Sequence[tuple[int, float, float]]]]:
        """Step and `StepDone.draws`, read from the log again; repeated steps occur twice."""
        for _, event in logged(self.folder):
            if isinstance(event, StepDone):
                yield event.step, event.draws

    @property
    def outcome(self) -> Outcome | None:
        """Why the run ended; None if it was killed or is running."""
        return _outcome(self.events)


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`. Raises OptionError and TrainingError, as `read_record`."""
    record = read_record(folder)
    events: list[Event] = []
    unreadable = 0
    for _, event in logged(folder):
        if event is None or len(events) == MOST_EVENTS:
            unreadable += 1
        else:
            events.append(replace(event, draws=()) if isinstance(event, StepDone) else event)
    return RunHistory(folder, record, tuple(events), unreadable)


def logged(folder: Path, *, only: bytes = b"") -> Iterator[tuple[bytes, Event | None]]:
    """Lines of a run's log that contain `only`, each with its event, None if unreadable. Raises TrainingError."""
    for line in _lines(folder / EVENTS):
        if not line.strip() or only not in line:
            continue
        try:
            yield line, decoded(line.decode(errors="replace"))
        except ValueError:
            yield line, None


def logged_outcome(folder: Path) -> Outcome | None:
    """Why the run in a folder ended, as `RunHistory.outcome`, without reading its whole log."""
    return _outcome(event for _, event in logged(folder, only=b"Run"))


def _outcome(events: Iterable[Event | None]) -> Outcome | None:
    last = None
    for event in events:
        if isinstance(event, RunStarted | RunFinished):
            last = event
    return last.reason if isinstance(last, RunFinished) else None


def read_record(folder: Path) -> RunRecord:
    """Content of `run.json`. Raises OptionError if there is no run, TrainingError if it is unreadable or damaged."""
    path = folder / RECORD
    if not path.is_file():
        raise OptionError(f"a run folder must contain run.json, got {folder}; name one such as runs/photos-001")
    try:
        return parsed_record(read_regular(path))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}), which is needed to identify the run; restore it from a copy"
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; only the start of those that are too long."""
    try:
        with open_regular(path) as file:
            while line := file.readline(MOST_LINE_BYTES):
                rest = line
                while len(rest) == MOST_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MOST_LINE_BYTES)
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
