"""Run states on disk, from which a run resumes bit-identically.

    states/step-000100.safetensors     tensors by part (engine/, snapshot/, ...), numbers as JSON in the header

A state is written atomically, and older ones are removed afterwards. A full disk causes a warning and fewer states,
never the end of a run. Each file carries the SHA-256 of its bytes (with zeros in place of the digest), which is
verified before use: a corrupt state is unreadable, and the run resumes from the state before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.core.files import is_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.formats.container import (
    check_safetensors,
    count_non_finite,
    header_text,
    read_safetensors,
    serialised,
    write_safetensors,
)
from lorasmith.training.events import StateSaved, Warned
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.recovery import RunState

_KEY, _DIGEST = "lorasmith.run_state", "lorasmith.digest"
_UNSIGNED = "0" * 64
_FORMAT = 2
STATES = "states"
"""Their folder in that of a run."""

SPARE_BYTES = 64 * 2**20
"""Disk space in bytes left for plots, pictures and the report."""


class RunStates:
    """The run states in a folder, which is created with the first one; the newest `keep` are kept."""

    def __init__(self, folder: Path, *, keep: int, config: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._config = dict(config or {})

    def paths(self) -> list[Path]:
        """The files, newest first."""
        named = (path for path in self.folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem))
        found = filter(is_regular, named)
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)

    def newest(self, on_skipped: Callable[[str], None] = lambda sentence: None) -> RunState | None:
        """The newest readable state, None if there are none; unreadable ones are reported and renamed.

        Raises OutputError if there are states, but none can be read.
        """
        unreadable: list[tuple[Path, LorasmithError]] = []
        for path in self.paths():
            try:
                state = load_state(path)
            except LorasmithError as error:
                unreadable.append((path, error))
                continue
            for other, reason in unreadable:
                on_skipped(f"A run state is skipped: {reason}.")
                with contextlib.suppress(OSError):  # something has that name; it is skipped again
                    other.rename(other.with_suffix(".unreadable"))
            return state
        if unreadable:
            raise OutputError(f"no state of this run can be read ({unreadable[0][1]}); start fresh")
        return None

    def save(self, state: RunState) -> Path:
        """Write a state, then remove those beyond the number kept. Raises OutputError, also if the disk is full."""
        path = self.folder / f"step-{state.step:06}.safetensors"
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
        needed = 2 * size + SPARE_BYTES  # the LoRA at the end is smaller than a state
        if free_bytes(self.folder) < needed:
            self._remove_beyond(1)  # fewer states are better than none
        if (free := free_bytes(self.folder)) < needed:
            raise OutputError(
                f"a run state needs {size / 2**20:,.0f} MiB of disk space and {free / 2**20:,.0f} MiB are free; "
                "free some space"
            )
        save_state(path, replace(state, numbers={**state.numbers, "config": self._config}))
        self._remove_beyond(self._keep)
        return path

    def remove_oldest(self, *, least: int) -> bool:
        """Remove a state, if there are more than `least`; whether there were."""
        paths = self.paths()
        if len(paths) <= least:
            return False
        paths[-1].unlink(missing_ok=True)
        return True

    def _remove_beyond(self, number: int) -> None:
        for path in self.paths()[number:]:
            path.unlink(missing_ok=True)


class StateSaver(Watcher):
    """Saves the state of a run by steps and by minutes (0 disables either), and when it ends."""

    def __init__(self, states: RunStates, *, every: int, minutes: float, before: Callable[[], None]) -> None:
        self._states = states
        self._before = before  # flushes other files that resuming reads
        self._every = every
        self._seconds = minutes * 60
        self._last_step = -1
        self._last_time = time.monotonic()  # the wall clock may be adjusted
        self._failing = False

    def due(self, loop: Loop) -> bool:
        by_steps = bool(self._every) and loop.step % self._every == 0
        return by_steps or (bool(self._seconds) and time.monotonic() - self._last_time >= self._seconds)

    def __call__(self, loop: Loop) -> None:
        self._last_time = time.monotonic()
        self._before()
        try:
            path = self._states.save(loop.state())
        except (LorasmithError, OSError) as error:
            if not self._failing:
                loop.emit(Warned(message=f"The state of step {loop.step} is not saved: {error}. Training continues."))
            self._failing = True
            return
        self._failing = False
        self._last_step = loop.step
        loop.emit(StateSaved(step=loop.step, path=str(path)))

    def end(self, loop: Loop) -> None:
        if loop.is_whole and loop.step != self._last_step:
            self(loop)


def save_state(path: Path, state: RunState) -> None:
    """Write a state atomically. Raises OutputError."""
    header = {"format": _FORMAT, "step": state.step, **state.numbers}
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise OutputError(
            "a run state must have finite numbers, but its optimizer counts in NaN or infinity"
        ) from error
    metadata = {_KEY: text, _DIGEST: _UNSIGNED}
    digest = _sha256(serialised(state.tensors, metadata))
    write_safetensors(path, state.tensors, {**metadata, _DIGEST: digest})


def is_state(path: Path) -> bool:
    """Whether a file is a run state, even if damaged. Raises OutputError if it is not a safetensors file."""
    is_named = _KEY.encode() in header_text(path, OutputError)[0]  # so that only headers that name it are parsed
    return is_named and _KEY in check_safetensors(path, OutputError).metadata


def load_state(path: Path) -> RunState:
    """Read a state. Raises OutputError if it is missing, damaged, or not a run state."""
    header = check_safetensors(path, OutputError)
    if (text := header.metadata.get(_KEY)) is None:
        raise OutputError(f"{path} must be a run state but is another kind of file; name the folder of a run")
    digest = header.metadata.get(_DIGEST, "")
    if not re.fullmatch("[0-9a-f]{64}", digest) or _sha256(_unsigned(path, header.body_start, digest)) != digest:
        raise OutputError(f"{path} must have the bytes that were written, but its SHA-256 is another; check the disk")
    try:
        numbers = parse_foreign_json(text)
        is_known = isinstance(numbers, dict) and numbers.pop("format", None) == _FORMAT
        if not is_known or type(step := numbers.pop("step", None)) is not int:
            raise ValueError("is of another format")
    except ValueError as error:
        raise OutputError(
            f"{path} was written by another version of Lorasmith (its header {error}); use that"
        ) from None
    tensors, _ = read_safetensors(path, OutputError)
    if name := next((name for name, tensor in tensors.items() if count_non_finite(tensor)), None):
        raise OutputError(f"{path} must have finite numbers, but {name} has NaN or infinity; get the folder again")
    # Copies: the file may be removed while its tensors are in use.
    return RunState(step, {name: tensor.clone() for name, tensor in tensors.items()}, numbers)


def _unsigned(path: Path, body_start: int, digest: str) -> Iterator[bytes]:
    """The bytes of a state before its digest was filled in."""
    with path.open("rb") as file:
        yield file.read(body_start).replace(digest.encode(), _UNSIGNED.encode(), 1)
        while block := file.read(1 << 20):
            yield block


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space in bytes on the disk of a folder, which need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
