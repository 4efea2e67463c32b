"""A fence around what an attempt of a job writes.

Whoever starts an attempt writes its number into a note, and removes the note when the attempt has ended or was given
up. A process whose attempt is not the noted one, as on a machine that could not be reached for a while, writes nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import OutputError

_PAUSE_S = 1.0  # between looks of `check_fence_sometimes`


class StaleAttemptError(OutputError):
    """The attempt of a job that this process works on was given up."""


class _Fence:
    """That of this process, if it has one."""

    note: Path | None = None
    attempt = 0
    looked = 0.0


_FENCE = _Fence()


@contextlib.contextmanager
def fenced(note: Path, attempt: int) -> Iterator[None]:
    """Inside the context, this process writes to runs only as long as `note` holds the number of its attempt."""
    _FENCE.note, _FENCE.attempt = note, attempt
    try:
        yield
    finally:
        _FENCE.note = None


def check_fence() -> None:
    """Raise StaleAttemptError if the attempt of this process was given up; without a fence nothing."""
    note, attempt = _FENCE.note, _FENCE.attempt
    if note is None:
        return
    try:
        found = note.read_text(encoding="ascii")
    except FileNotFoundError:
        found = "no attempt"
    except (OSError, ValueError) as error:
        raise OutputError(f"{note} cannot be read ({error}); check the shared folder") from error
    _FENCE.looked = time.monotonic()
    if found != str(attempt):
        raise StaleAttemptError(
            f"attempt {attempt} of this job was given up and another process may have its run, so nothing more is "
            "written; nothing needs to be done"
        )


def check_fence_sometimes() -> None:
    """As `check_fence`, at most once a second."""
    if _FENCE.note is not None and time.monotonic() - _FENCE.looked >= _PAUSE_S:
        check_fence()
