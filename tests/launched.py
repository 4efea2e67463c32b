"""Processes that tests start: their environment, a port where they meet, and how long they may take."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys

import pytest

from lorasmith.core.extras import EDITOR

needs_editor = pytest.mark.skipif(bool(EDITOR.trouble), reason=EDITOR.trouble)

LONG_S = 600.0
"""Longer than anything takes, however busy the machine is: what has not happened by then never will."""


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports what the tests import, on one thread.

    Args:
        **more: further variables.
    """
    path = os.pathsep.join(one for one in sys.path if one)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """A port that nobody listens at, and that systems give to nobody who asks for any."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 1_000):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("every port is taken")
