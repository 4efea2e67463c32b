"""Processes that tests start: their environment, a port where they meet, and how long they may take."""

from __future__ import annotations

import os
import socket
import sys

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
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
