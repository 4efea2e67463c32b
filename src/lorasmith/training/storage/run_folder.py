"""The folder of a run: its record, events, run states and results.

run.json        configuration, fingerprint, model, data and environment
events.jsonl    one event per line
states/         run states, from which it resumes
samples/        previews
requests/       what is asked of the run while it trains (`run_requests`)
averages/       averages over training
<name>.safetensors, loss.png, report.html    results

Within a named output, only files of runs are replaced or removed. A complete run that is started again with more steps
is moved aside as a whole (to out-old-1/), and the longer run starts from its end, in the same folder; its record names
the run state there as `existing_state`. If it is interrupted and started again, it is resumed, although only its record
has that setting.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path, PurePath
from typing import Any

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.core.fence import check_fence_sometimes
from lorasmith.core.files import (
    atomic_path,
    check_parents,
    check_writable,
    ensure_folder,
    is_regular,
    locked,
    write_atomic,
)
from lorasmith.core.power_average import AVERAGES
from lorasmith.core.printable import count_text, memory_text
from lorasmith.training.events import Event, EventHandler, Outcome, RolledBack, RunFinished, StepDone, Warned, encoded
from lorasmith.training.recovery import RunState
from lorasmith.training.storage.fingerprint import Fingerprint, differences, state_digest
from lorasmith.training.storage.records import EVENTS, RECORD, RunRecord, logged, logged_outcome, read_record
from lorasmith.training.storage.run_states import STATES, RunStates, free_bytes, load_state

PREVIEW_LORA = "preview.safetensors"
"""The LoRA that is drawn while a run trains; it is there for that time."""


class RunFolder:
    """A run's records; called with an event, it appends to the log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: FileIO | None = None
        self._is_cut = False  # whether the last line is incomplete
        self.lacks_last = False  # whether the last event is not in the log, for want of space
        self._claim: contextlib.ExitStack | None = None

    @property
    def exists(self) -> bool:
        return (self.path / RECORD).is_file()

    def record(self) -> RunRecord:
        """Content of `run.json`. Raises OptionError and TrainingError, as `read_record`."""
        return read_record(self.path)

    def outcome(self) -> Outcome | None:
        """Why the run ended; None if it was killed, is running, or does not exist."""
        return logged_outcome(self.path) if self.exists else None

    @property
    def is_done(self) -> bool:
        outcome = self.outcome()
        return outcome is not None and outcome.is_final

    def states(self, keep: int = 1, config: Mapping[str, Any] | None = None) -> RunStates:
        return RunStates(self.path / STATES, keep=keep, config=config)

    def claim(self) -> None:
        """Own the folder (created) until `release`, or the end of this process; nothing if it is owned.

        Raises:
            OutputError: another run in this or another process owns it, or it cannot be written.
        """
        if self._claim is None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._owned())
                self._claim = stack.pop_all()

    def release(self) -> None:
        """Close the log and end `claim`; a folder that was made for it and is empty is removed."""
        self.close()
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside the context, this process owns the folder. Raises OutputError as `claim`."""
        self.claim()
        try:
            self._tidy()
            yield
        finally:
            self.release()

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        check_writable(self.path)
        folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        ensure_folder(self.path)
        try:
            with self._locked():
                yield
        finally:
            with contextlib.suppress(OSError):  # something was written
                for folder in folders:
                    folder.rmdir()

    def check_free(self) -> None:
        """Raise OutputError if another process trains in it, or it cannot be written."""
        with self._locked():
            pass

    @property
    def is_busy(self) -> bool:
        """Whether another process trains in it, or it is not writable."""
        try:
            self.check_free()
        except OutputError:
            return True
        return False

    @property
    def is_training(self) -> bool:
        """Whether another process trains in it. Writes nothing, unless one was killed."""
        return is_regular(self.path / _LOCK) and self.is_busy

    def note_environment(self, environment: Mapping[str, Any]) -> None:
        """Add an environment to `run.json` if it is new. Raises OutputError."""
        record = self.record()
        if environment not in (known := record.all_environments):
            self.begin(replace(record, environments=(*known, dict(environment))))

    def begin(self, record: RunRecord) -> None:
        write_atomic(self.path / RECORD, record.to_text())

    def check_continues(self, record: RunRecord) -> None:
        """Raise OutputError if the run in this folder is another one, complete, or cannot be verified as requested."""
        before = self.record()
        check_verifiable(before, record.fingerprint, self.path)
        if changed := differences(before.fingerprint, record.fingerprint):
            raise OutputError(
                f"{self.path} holds another run, which differs in {'; '.join(changed)}; undo that, choose another "
                "output, or start fresh, which moves the old run aside"
            )
        if self.is_done:
            raise OutputError(
                f"{self.path} holds this run, which is complete; give more steps to train on from its end, choose "
                "another output, or start fresh, which moves it aside"
            )

    def move_aside(self) -> Path:
        """Rename the folder, to free its name for a fresh run; returns the new path. Raises OutputError."""
        if Path.cwd().is_relative_to(self.path.resolve()):  # relative paths would lead into the folder that was moved
            raise OutputError(f"{self.path} is to be moved aside, but holds the current folder; start from another one")
        number = 1
        while (target := self.path.with_name(f"{self.path.name}-old-{number}")).exists():
            number += 1
        is_claimed = self._claim is not None
        self.release()  # Windows cannot rename a folder with an open file
        try:
            self.path.rename(target)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be renamed to {target.name} ({error.strerror or error}); close programs that use "
                "its files, or choose another output"
            ) from error
        if is_claimed:
            self.claim()
        return target

    def rewind(self, step: int) -> None:
        """Truncate the log after a step, to resume from there."""
        with atomic_path(self.path / EVENTS) as temporary, temporary.open("wb") as file:
            for line, event in logged(self.path):
                if isinstance(event, StepDone | RolledBack) and event.step > step:
                    break
                if event is not None and not isinstance(event, RunFinished):
                    file.write(line.rstrip() + b"\n")

    def __call__(self, event: Event) -> None:
        """Append an event. A full disk costs the events until there is room again, not the run. Raises
        StaleAttemptError.
        """
        check_fence_sometimes()
        line = b"\n" * self._is_cut + f"{encoded(event)}\n".encode()
        self.lacks_last = True
        with contextlib.suppress(OSError):
            if self._log is None:
                self._log = (self.path / EVENTS).open("ab", buffering=0)
            self._is_cut = self.lacks_last = self._log.write(line) < len(line)

    def flush(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._log.fileno())

    def _tidy(self) -> None:
        """Remove temporary files and folders of a killed process; without a run, only those of `run.json`."""
        if self.exists:
            left = [
                leftover for name in ("", STATES, "samples", AVERAGES) for leftover in (self.path / name).glob(".*.tmp")
            ]
            if self.outcome() is None:  # otherwise it is a LoRA with that name
                left.append(self.path / PREVIEW_LORA)
        else:
            left = list(self.path.glob(f".{RECORD}.*.tmp"))
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        self._check_entries()
        return locked(self.path / _LOCK, f"{self.path} is in use by a run in another process")

    def _check_entries(self) -> None:
        """Raise OutputError if entries of an untrusted folder would redirect writes or block reads (links, pipes)."""
        folders = (self.path, *(self.path / name for name in (STATES, "samples", AVERAGES)))
        for path in [path for folder in folders for path in _entries(folder)]:
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OutputError(
                    f"{self.path} must hold files and folders alone, but {path.name} is a link or a pipe; remove it"
                )

    def close(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None


def check_room(place: Path, size_bytes: int) -> None:
    """Raise OutputError if the disk of a run's folder, or of one above it, has less than `size_bytes` free."""
    there = sum(path.stat().st_size for path in RunFolder(place).states().paths())  # which the new ones replace
    if (free := free_bytes(place) + there) < size_bytes:
        raise OutputError(
            f"the run writes {memory_text(size_bytes)} to {place}, whose disk has {memory_text(free)} free; free some "
            "space, or choose another output"
        )


@contextlib.contextmanager
def claimed_run(
    folder: RunFolder, record: RunRecord, *, fresh: bool, on_event: EventHandler = lambda event: None
) -> Iterator[RunState | None]:
    """Inside the context, this process owns the folder of a run; yields the run state to resume from, or None.

    `fresh` moves an existing run aside. `on_event` receives a `Warned` for that and for each unreadable run state.
    Raises OutputError if the folder holds another or complete run, or another process trains in it.
    """
    with folder.claimed():
        if fresh and folder.exists:
            aside = folder.move_aside()
            on_event(Warned(message=f"The previous run in {folder.path} was moved to {aside}."))
        state = None
        if folder.exists:
            folder.check_continues(record)
            state = folder.states().newest(lambda sentence: on_event(Warned(message=sentence)))
            folder.rewind(0 if state is None else state.step)
            folder.note_environment(record.environment)
        else:
            folder.begin(record)
        yield state


def check_verifiable(before: RunRecord, now: Fingerprint, file: Path) -> None:
    """Raise OutputError if file digests are to be compared with a record that has none; `file` is for the message."""
    if now.get("files") and not before.fingerprint.get("files"):
        raise OutputError(
            f"{file} has no digests of the base model's whole files, as its run was started without --verify; leave "
            "--verify out"
        )


def unfinished_run(parent: Path, title: str, fingerprint: Fingerprint) -> Path | None:
    """The newest folder below `parent`, named after `title`, that holds this run, unfinished and not in use."""
    for _, path in sorted(numbered_runs(parent, title), reverse=True):
        folder = RunFolder(path)
        if not folder.exists or not folder.states().paths() or folder.is_busy:
            continue
        with contextlib.suppress(LorasmithError):
            if not differences(folder.record().fingerprint, fingerprint) and not folder.is_done:
                return path
    return None


def new_run_folder(parent: Path, title: str, *, numbering: str = "-{:03}") -> Path:
    """A new folder, numbered after the highest existing one with that title; runs are never overwritten."""
    last = max((number for number, _ in numbered_runs(parent, title, any_case=True)), default=0)
    return parent / (title + numbering.format(last + 1))


def numbered_runs(parent: Path, title: str, *, any_case: bool = False) -> list[tuple[int, Path]]:
    """(number, path) of entries below `parent` whose name is the title and a number, such as `dog-001`.

    `any_case` also accepts `Dog-001` for the title `dog`, as on file systems that ignore case.
    """
    names = re.compile(re.escape(title) + r"[-_]([0-9]+)", re.IGNORECASE if any_case else 0)
    return [(int(match[1]), path) for path in _entries(parent) if (match := names.fullmatch(path.name))]


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


_LOCK = ".lock"
_STATE = "existing_state"


def continuing(folder: RunFolder, record: RunRecord, on_event: EventHandler) -> RunRecord:
    """The record of a run in a folder that holds a run: starting from the end of that one, if it is shorter.

    The shorter run's folder, which is claimed, is moved aside, with a `Warned`. If the folder holds another run,
    `record` is unchanged. Raises OutputError if the run there is complete and not shorter, unreadable or immovable,
    OptionError without a run state.
    """
    if record.config.get(_STATE) is not None:  # which names what to start from
        return record
    before = folder.record()
    steps, new_steps = before.config.get("steps"), record.config.get("steps")
    if not is_same_or_longer(before.fingerprint, record.fingerprint):
        return record
    if not isinstance(steps, int) or not isinstance(new_steps, int):
        return record
    if new_steps == steps or not folder.is_done:
        return _with_its_state(folder, before, record)
    _check_longer(folder, steps, new_steps)
    check_verifiable(before, record.fingerprint, folder.path)
    newest = folder.states().paths()[0]
    load_state(newest)  # a damaged one is refused before anything is moved
    aside = folder.move_aside()
    on_event(Warned(message=f"The complete run in {folder.path} was moved to {aside}; this one starts from its end."))
    return _from_state(record, (aside / "states" / newest.name).resolve())


def _check_longer(folder: RunFolder, steps: int, new_steps: int) -> None:
    """Raise unless the complete run in a folder has a state, and fewer `steps` than `given`."""
    if new_steps <= steps:
        raise OutputError(
            f"{folder.path} holds this run, which is complete with {count_text(steps, 'step')}, and {new_steps} were "
            "given; give more steps to train on from its end, choose another output, or start fresh, which moves it "
            "aside"
        )
    if not folder.states().paths():
        raise OptionError(
            f"{folder.path} has no run state to continue from; choose another output, and train again with its LoRA as "
            "existing_lora"
        )


def _with_its_state(folder: RunFolder, before: RunRecord, record: RunRecord) -> RunRecord:
    """The record with the state that the run in the folder started from, if it started from one."""
    path = before.config.get(_STATE)
    if not isinstance(path, str):
        return record
    # Looked up beside the folder, as both may have been moved; paths of an untrusted record are not opened.
    parts = PurePath(path).parts[-3:]
    if len(parts) < 3 or ".." in parts:
        return record
    found = folder.path.resolve().parent.joinpath(*parts)
    if folder.states().paths():  # it continues from these
        initial = before.fingerprint.get("initial", "")
        return _starting(record, found, initial)
    try:
        return _from_state(record, found)
    except OutputError:
        return record


def checked_start(record: RunRecord) -> str:
    """Raise OutputError if the run whose state a run starts from differs in more than its length.

    Returns a sentence if that cannot be compared, as the state is not in the folder of its run; otherwise an empty one.
    """
    if (state := record.config.get(_STATE)) is None:
        return ""
    path = Path(str(state)).resolve()
    folder = RunFolder(path.parent.parent)
    if not folder.exists or path not in folder.states().paths():
        return f"Whether {path} is of the same images, settings and model is not known, as its run is not beside it."
    if changed := differences(_without_length(folder.record().fingerprint), _without_length(record.fingerprint)):
        raise OutputError(
            f"{path} is of a run that differs in {'; '.join(changed)}; undo that, or train with its LoRA as "
            "existing_lora, which starts the optimizer afresh"
        )
    return ""


def _from_state(record: RunRecord, path: Path) -> RunRecord:
    return _starting(record, path, record.fingerprint.get("initial", "") + state_digest(path))


def _starting(record: RunRecord, path: Path, initial: str) -> RunRecord:
    whole: Fingerprint = {**record.fingerprint, "initial": initial}
    setting = {_STATE: str(path)}
    return replace(record, config={**record.config, **setting}, asked={**record.asked, **setting}, fingerprint=whole)


def is_same_or_longer(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether two runs are one, but for the number of steps and the run state that each started from."""
    return not differences(_without_length(before), _without_length(now))


def _without_length(fingerprint: Fingerprint) -> Fingerprint:
    """A fingerprint without the number of steps and the run state that it started from."""
    config = {name: value for name, value in fingerprint.get("config", {}).items() if name != "steps"}
    return {**fingerprint, "config": config, "initial": fingerprint.get("initial", "").partition("+")[0]}


_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""Files that Windows puts into folders; those of other systems are hidden by a dot in front."""


def output_folder(output: Path, title: str) -> Path:
    """The folder of a run: `output`, or a subfolder `title` beside files that are not a run's. Raises OutputError."""
    if output.suffix.lower() == ".safetensors" and not output.is_dir():
        raise OutputError(
            f"output must be the folder of the run, got the file {output}; give {output.with_suffix('')} as output, "
            f"and {output.stem} as the name"
        )
    if not _is_of_others(output):
        return output
    inner = output / title
    if inner.is_symlink():
        raise OutputError(
            f"{output} has files that are not a run's, and {inner.name} in it is a link; name another output"
        )
    if _is_of_others(inner):
        raise OutputError(
            f"{output} has files that are not a run's, and so has {title} in it, where the run would be; choose "
            "another output"
        )
    return inner


def _is_of_others(folder: Path) -> bool:
    """Whether a folder holds files but no run. Raises OutputError if it is a file or cannot be read."""
    if not folder.exists():
        check_parents(folder)
        return False
    if (folder / RECORD).is_file():
        return False
    if not folder.is_dir():
        raise OutputError(f"{folder} must be a folder but is a file; move it away or choose another output")
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read ({error.strerror}); check its permissions, or choose another output"
        ) from error
    return any(not name.startswith(".") and name.lower() not in _SYSTEM_FILES for name in names)
