"""The folder of a run: everything needed to repeat it, everything that happened, everything that came out.

run.json        configuration, fingerprint, model, data and environment
events.jsonl    one event a line, as it happened
states/         run states, from which it continues
samples/        pictures drawn on the way
<name>.safetensors, loss.png, report.html    what came out
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.core.files import ensure_folder, locked, write_atomic
from lorasmith.training.events import Event, EventHandler, RolledBack, RunFinished, StepDone, Warned, encoded
from lorasmith.training.outcome import Outcome
from lorasmith.training.progress import RunState
from lorasmith.training.runs.fingerprint import differences, environments_of
from lorasmith.training.runs.history import EVENTS, RECORD, read_history, read_record
from lorasmith.training.runs.run_states import RunStates

__all__ = ["RunFolder", "claimed_run", "numbered_runs", "unfinished_run"]


class RunFolder:
    """A run's records; as an event handler, its log.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: TextIO | None = None
        self._broken = False

    @property
    def exists(self) -> bool:
        """Whether it holds a run."""
        return (self.path / RECORD).is_file()

    def record(self) -> dict[str, Any]:
        """Content of `run.json`. Raises OptionError and TrainingError, as `read_record` does."""
        return read_record(self.path)

    def outcome(self) -> Outcome | None:
        """Why the run ended; None if it was killed, is still running, or there is none."""
        return read_history(self.path).outcome if self.exists else None

    @property
    def is_done(self) -> bool:
        """Whether its run ended by itself, so that it is not continued."""
        outcome = self.outcome()
        return outcome is not None and outcome.is_final

    def states(self, keep: int = 1, config: Mapping[str, Any] | None = None) -> RunStates:
        """Its run states."""
        return RunStates(self.path / "states", keep=keep, config=config)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder, made if it is missing, for one process alone. Raises OutputError if another one has it."""
        ensure_folder(self.path)
        with self._locked():
            self._tidy()
            try:
                yield
            finally:
                self.close()

    def check_free(self) -> None:
        """Raises OutputError if another process is training in it, or it cannot be written to."""
        with self._locked():
            pass

    @property
    def is_busy(self) -> bool:
        """Whether it can not be trained in now: another process does, or it is somebody else's."""
        try:
            self.check_free()
        except OutputError:
            return True
        return False

    def environments(self) -> list[dict[str, Any]]:
        """Those that the run was trained in so far, one after the other: its numbers come from all of them."""
        return environments_of(self.record())

    def note_environment(self, environment: Mapping[str, Any]) -> None:
        """Add the one that the run goes on in to `run.json`, unless it is there. Raises OutputError."""
        if environment not in (known := self.environments()):
            self.begin({**self.record(), "environments": [*known, environment]})

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write `run.json`. Raises OutputError."""
        write_atomic(self.path / RECORD, json.dumps(record, indent=2, ensure_ascii=False))

    def check_continues(self, record: Mapping[str, Any]) -> None:
        """Raises OutputError if the run in this folder is another one, or done."""
        before = self.record()
        if found := differences(before.get("fingerprint", {}), record["fingerprint"]):
            raise OutputError(
                f"{self.path} holds another run, which differs in {'; '.join(found)}; undo that, choose another "
                "output, or start fresh, which moves that one aside"
            )
        if self.is_done:
            raise OutputError(f"{self.path} holds this run, and it is done; choose another output, or start fresh")

    def move_aside(self) -> Path:
        """Rename the folder, so that a fresh run finds its place free; returns the new name. Raises OutputError."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}-old-{number}")).exists():
            number += 1
        try:
            self.path.rename(target)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be renamed to {target.name} ({error.strerror or error}); close what has its files "
                "open, or choose another output"
            ) from error
        return target

    def rewind(self, step: int) -> None:
        """Cut the log behind a step, to go on from there."""
        kept: list[Event] = []
        for event in read_history(self.path).events:
            if isinstance(event, StepDone | RolledBack) and event.step > step:
                break
            if not isinstance(event, RunFinished):
                kept.append(event)
        write_atomic(self.path / EVENTS, "".join(f"{encoded(event)}\n" for event in kept))

    def __call__(self, event: Event) -> None:
        """Append an event. A disk without room costs the log, never the run."""
        if self._broken:
            return
        try:
            if self._log is None:
                self._log = (self.path / EVENTS).open("a", encoding="utf-8", buffering=1)
            self._log.write(f"{encoded(event)}\n")
        except OSError:
            self._broken = True

    def flush(self) -> None:
        """Have what is logged on the disk."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._log.fileno())

    def _tidy(self) -> None:
        """Remove what a process that was killed has left half done."""
        left = [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]
        if self.outcome() is None:  # otherwise it is a LoRA of that name
            left.append(self.path / "preview.safetensors")
        for path in left:
            path.unlink(missing_ok=True)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.path / ".lock", f"{self.path} belongs to a run that is going on in another process")

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None


@contextlib.contextmanager
def claimed_run(
    path: Path, record: Mapping[str, Any], *, fresh: bool, tell: EventHandler = lambda event: None
) -> Iterator[tuple[RunFolder, RunState | None]]:
    """A folder for a run, and the state that it goes on from, None to begin.

    Args:
        path: the folder.
        record: content of its `run.json`, with the run's fingerprint.
        fresh: move a run that is there aside.
        tell: is told where to, and of run states that cannot be read.

    Raises:
        OutputError: the folder holds another run, one that is done, or one that goes on elsewhere.
    """
    folder = RunFolder(path)
    if fresh and folder.exists:
        folder.check_free()  # and not while it is claimed: Windows renames no folder in which a file is open
        aside = folder.move_aside()
        tell(Warned(message=f"The run that was in {path} is in {aside} now."))
    with folder.claimed():
        state = None
        if folder.exists:
            folder.check_continues(record)
            state = folder.states().newest(lambda sentence: tell(Warned(message=sentence)))
            folder.rewind(0 if state is None else state.step)
            folder.note_environment(record["environment"])
        else:
            folder.begin(record)
        yield folder, state


def unfinished_run(parent: Path, title: str, fingerprint: Mapping[str, Any]) -> Path | None:
    """The newest folder below `parent`, named after the title, that holds this run to be continued by nobody else."""
    for _, path in sorted(numbered_runs(parent, title), reverse=True):
        folder = RunFolder(path)
        if not folder.exists or not folder.states().paths() or folder.is_busy:
            continue
        with contextlib.suppress(LorasmithError):
            if not differences(folder.record().get("fingerprint", {}), fingerprint) and not folder.is_done:
                return path
    return None


def numbered_runs(parent: Path, title: str) -> list[tuple[int, Path]]:
    """What is below `parent` with a name of the title and a number, such as `dog-001`, with the number."""
    names = re.compile(re.escape(title) + r"[-_]([0-9]+)")
    return [(int(match[1]), path) for path in _entries(parent) if (match := names.fullmatch(path.name))]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
