"""An audit hook that refuses and records every address but this machine's, of sockets of Python code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_HERE = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None}


def refuse_network(record: Callable[[str], object]) -> None:
    """From now on and in this process, `record` is called with each attempt, which is then an error."""

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            host = args[1][0] if isinstance(args[1], tuple) else None  # others are files and pipes
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = args[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in _HERE:
            record(f"{event} {host}")
            raise PermissionError(f"no network: {event} {host}")

    sys.addaudithook(refuse)
