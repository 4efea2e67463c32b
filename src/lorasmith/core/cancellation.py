"""Whether the answer that a thread works for is still wanted, as whoever asked may be gone; and how far it is."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

from lorasmith.core.errors import CancelledError

Progress: TypeAlias = Callable[[int, int], object]  # receives (done, total)

_given_up: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("given_up", default=None)
_progress: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("progress", default=None)


@contextlib.contextmanager
def answering(given_up: threading.Event, progress: Progress | None = None) -> Iterator[None]:
    """Inside the context, `check_wanted` of this thread raises once `given_up` is set, and `progress` receives what it
    reports.
    """
    tokens = _given_up.set(given_up), _progress.set(progress)
    try:
        yield
    finally:
        _given_up.reset(tokens[0])
        _progress.reset(tokens[1])


def report_progress(done: int, total: int) -> None:
    """Tell whoever waits for the answer that `done` of `total` pieces of work are done."""
    if (progress := _progress.get()) is not None:
        progress(done, total)


def check_wanted() -> None:
    """Raise CancelledError if what this thread works for was given up; called between pieces of long work."""
    given_up = _given_up.get()
    if given_up is not None and given_up.is_set():
        raise CancelledError("nobody waits for the answer any more")
