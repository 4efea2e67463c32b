"""Processor time, which other programs of the machine hardly change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def processor_time(*, at_most_s: float) -> Iterator[None]:
    """The context takes a bounded time: many times what it needs, and far from what it took when it was slow."""
    before = time.process_time()
    yield
    assert time.process_time() - before < at_most_s
