"""A run as its folder tells it: its record, and what the lines of its log add up to.

A log may have gigabytes, mostly draws, so it is reduced while it is read, and read on from where it was read to. A
resumed run rewrites its log without the events that it repeats: that is another file, which is read from its start.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.core.cancellation import check_wanted
from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import open_regular
from lorasmith.runs.view import RunView
from lorasmith.training.events import MOST_LINE_BYTES, Event, RunStarted, StepDone, decoded
from lorasmith.training.storage.ledger import Ledger
from lorasmith.training.storage.records import EVENTS, MOST_EVENTS, RunRecord, read_record

_LINES = 500  # between two looks whether the answer is still wanted
_PATIENCE_S = 0.2


@dataclass(frozen=True)
class LoggedRun:
    """The record and the log of a run."""

    folder: Path
    record: RunRecord
    log: RunLog

    @property
    def view(self) -> RunView:
        return self.log.view


def read_run(folder: Path) -> LoggedRun:
    """The run in `folder`. Raises OptionError and TrainingError, as `read_record`."""
    record = read_record(folder)
    log = RunLog(folder, names_in(record))
    log.read()
    return LoggedRun(folder, record, log)


@contextlib.contextmanager
def followed(folder: Path) -> Iterator[LoggedRun]:
    """As `read_run`, of a log that is kept and read on next time; inside the context no other thread reads it."""
    record = read_record(folder)
    with _kept_log(folder, names_in(record)) as log:
        yield LoggedRun(folder, record, log)


def view_of_log(folder: Path) -> dict[str, Any]:
    """The view of the log in `folder` as JSON, kept as by `followed`; neither log nor record need exist yet. Raises
    TrainingError if the log cannot be read.
    """
    names: tuple[str, ...] | None = None
    if folder.resolve() not in _kept:
        with contextlib.suppress(OptionError, TrainingError):
            names = names_in(read_record(folder))
    with _kept_log(folder, names) as log:
        return log.view.to_json()


def names_in(record: RunRecord) -> tuple[str, ...]:
    """The names of a run's samples, which the draws of its log refer to by index."""
    return tuple(sample.name for sample in record.samples)


_MOST_KEPT_BYTES = 2**28  # of logs, whose sums take about as much memory
_kept: dict[Path, RunLog] = {}  # the last used at the end
_keeping = threading.Lock()


@contextlib.contextmanager
def _kept_log(folder: Path, names: Sequence[str] | None) -> Iterator[RunLog]:
    """The log in `folder`, up to date; that of other `names` begins again."""
    place = folder.resolve()
    with _keeping:
        log = _kept.pop(place, None)
        if log is None or names not in (None, log.names):
            log = RunLog(place, names or ())
        _kept[place] = log
    while not log.lock.acquire(timeout=_PATIENCE_S):  # another thread reads it, maybe for long
        check_wanted()
    try:
        log.read()
        yield log
    finally:
        log.lock.release()
        with _keeping:
            while len(_kept) > 1 and sum(log.size_bytes for log in _kept.values()) > _MOST_KEPT_BYTES:
                del _kept[next(iter(_kept))]


class RunLog:
    """What the log of a run adds up to; `read` takes the lines that are new.

    Attributes:
        names: of the run's samples.
        lock: held by `read`, and by whoever uses the others while another thread may read.
        view: what is shown.
        starts: one for each attempt.
        ledger: the draws of its steps.
        size_bytes: of what was read.
        is_cut: whether it has more than `MOST_EVENTS`, which are not read.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.lock = threading.RLock()
        self._path = folder / EVENTS
        self._inode = 0
        self._clear()

    def _clear(self) -> None:
        self.view = RunView()
        self.starts: list[RunStarted] = []
        self.ledger = Ledger(self.names)
        self.size_bytes = 0
        self.is_cut = False
        self._events = self._unreadable = 0
        self._is_long = self._is_torn = False  # what is at the end: a part of too long a line, or of one

    @property
    def unreadable(self) -> int:
        """Number of lines that are no events, an incomplete one at the end included."""
        return self._unreadable + (self._is_torn or self._is_long)

    def read(self) -> None:
        """Take what is new; the log need not exist yet. Raises TrainingError if it cannot be read, and CancelledError
        if nobody waits for it any more; then it can be read on later.
        """
        with self.lock:
            try:
                with open_regular(self._path) as file:
                    status = os.fstat(file.fileno())
                    if status.st_ino != self._inode or status.st_size < self.size_bytes:
                        self._inode = status.st_ino
                        self._clear()
                    file.seek(self.size_bytes)
                    for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b"")):
                        if number % _LINES == 0:
                            check_wanted()
                        self.is_cut = self._events == MOST_EVENTS
                        if self.is_cut or not self._take_line(line):
                            break
            except FileNotFoundError:
                return
            except OSError as error:
                raise TrainingError(f"{self._path} cannot be read ({error.strerror}); check its permissions") from error

    def take(self, event: Event) -> None:
        self._events += 1
        self.view.take(event)
        if isinstance(event, StepDone):
            self.ledger.add(event.step, event.draws)
        elif isinstance(event, RunStarted):
            self.starts.append(event)

    def _take_line(self, line: bytes) -> bool:
        """Take a line, or a piece of one that is longer than any event; returns False if it is still being written."""
        is_end = line.endswith(b"\n")
        if not self._is_long and (is_end or len(line) < MOST_LINE_BYTES):
            try:
                if line.strip():
                    self.take(decoded(line))
            except ValueError:
                self._is_torn = not is_end
                self._unreadable += is_end
                if self._is_torn:
                    return False
            self._is_torn = False
        else:
            self._is_long = not is_end
            self._unreadable += is_end
        self.size_bytes += len(line)
        return True
