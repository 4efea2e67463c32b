"""Whether the answer that a thread works for is still wanted, as whoever asked may be gone."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator

from lorasmith.core.errors import CancelledError

_given_up: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("given_up", default=None)


@contextlib.contextmanager
def answering(given_up: threading.Event) -> Iterator[None]:
    """Inside the context, `check_wanted` of this thread raises once `given_up` is set."""
    token = _given_up.set(given_up)
    try:
        yield
    finally:
        _given_up.reset(token)


def check_wanted() -> None:
    """Raise CancelledError if what this thread works for was given up; called between pieces of long work."""
    given_up = _given_up.get()
    if given_up is not None and given_up.is_set():
        raise CancelledError("nobody waits for the answer any more")
