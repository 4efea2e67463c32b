"""Several hosts on one machine: network namespaces on a bridge, each with a name, an address and a file of hosts.

As on many machines, a host's own name is 127.0.1.1 there, and the others have addresses. Links can be given a rate, and
count their bytes. Needs Linux, root and iproute2; `missing` says what is not there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINK = "eth0"


@dataclass(frozen=True)
class Host:
    """A host.

    Attributes:
        name: by which the others know it.
        address: its own on the network.
        namespace: of its network.
    """

    name: str
    address: str
    namespace: str

    def start(
        self, command: Sequence[object], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command there, in a session of its own.

        Args:
            command: its words.
            env: variables besides those of this process.
            options: of `subprocess.Popen`.
        """
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        words = ["ip", "netns", "exec", self.namespace, *named, *map(str, command)]
        whole = {**os.environ, **(env or {})}
        return subprocess.Popen(words, env=whole, text=True, start_new_session=True, **options)

    @property
    def processes(self) -> list[int]:
        """Ids of all processes there."""
        return [int(one) for one in _run("ip", "netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """End everything there at once; its connections end too, as on a host that starts again."""
        while found := self.processes:
            for one in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)

    @property
    def sent_bytes(self) -> int:
        """Bytes that it has sent over its link so far, headers included."""
        return int(self.run("cat", f"/sys/class/net/{_LINK}/statistics/tx_bytes"))

    def limit(self, mbit: float | None) -> None:
        """Give what it sends a rate in million bits a second; None for no limit."""
        with contextlib.suppress(subprocess.CalledProcessError):  # there is nothing to take away
            self.run("tc", "qdisc", "del", "dev", _LINK, "root")
        if mbit is not None:
            burst = max(16_000, int(mbit * 125_000 * 0.001))  # of a millisecond
            rate = ("rate", f"{mbit}mbit", "burst", burst, "latency", "500ms")
            self.run("tc", "qdisc", "add", "dev", _LINK, "root", "tbf", *rate)

    def run(self, *command: object) -> str:
        """What a command prints there."""
        return _run("ip", "netns", "exec", self.namespace, *command)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Inside the context, there are hosts named `host1`, `host2` and so on; their processes end with it."""
    mark = f"ls{os.getpid()}"
    switch = f"{mark}-switch"
    found = [Host(f"host{one}", f"10.77.0.{one}", f"{mark}-{one}") for one in range(1, count + 1)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(found):
            ours = ("ip", "-n", host.namespace)
            _run("ip", "netns", "add", host.namespace)
            peer = ("peer", "name", f"port{number}", "netns", switch)
            _run("ip", "link", "add", _LINK, "netns", host.namespace, "type", "veth", *peer)
            _run("ip", "-n", switch, "link", "set", f"port{number}", "master", "br0", "up")
            _run(*ours, "addr", "add", f"{host.address}/24", "dev", _LINK)
            for link in ("lo", _LINK):
                _run(*ours, "link", "set", link, "up")
            others = [f"{one.address} {one.name}\n" for one in found if one is not host]
            folder = _files(host)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{''.join(others)}")
        yield found
    finally:
        for host in found:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill()
            shutil.rmtree(_files(host), ignore_errors=True)
        for namespace in (*(host.namespace for host in found), switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", namespace)


@functools.cache
def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    try:
        with hosts(1) as (host,):
            host.run("unshare", "--uts", "true")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here ({error})"
    return ""


def _files(host: Host) -> Path:
    """Files that replace those of /etc there."""
    return Path("/etc/netns", host.namespace)


def _run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return done.stdout
