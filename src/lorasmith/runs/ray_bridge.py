"""A worker on a machine of a Ray cluster, as a process of this one: `python -m lorasmith.runs.ray_bridge ADDRESS`.

It carries the messages of `child_process` between its supervisor and an actor, which starts the worker of
`runs/worker.py` on the machine that Ray chose. So supervisor and server know nothing of Ray, and a machine that is lost
is a process that ended. The lock of the worker is held here, as the supervisor's next process is started here, too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.core.files import locked
from lorasmith.core.printable import one_line_of, printable
from lorasmith.runs.child_process import BlockingChannel, Message, channel_of_child
from lorasmith.runs.ray_cluster import RayPlaces, connected, version_fault, versions

_LOCK_PAUSE_S, _POLL_S = 0.1, 2.0
_MARGIN_S = 10.0  # for the end of the worker to arrive
_STARTING_S = 600.0  # for a place, during which the bridge sends heartbeats, and then says that it still waits


class RemoteWorker:
    """An actor: a worker process on its machine, and its messages. Methods are called from several threads.

    It is sent by value, and imports only the standard library and the lorasmith of its machine.
    """

    def __init__(self) -> None:
        import collections
        import threading

        self._process: Any = None
        self._arrived = threading.Condition()
        self._messages: Any = collections.deque()
        self._ended = ""

    def machine(self) -> dict[str, Any]:
        """Its name, and the versions there."""
        import socket

        from lorasmith.runs.ray_cluster import versions

        return {"name": socket.gethostname(), "versions": versions()}

    def start(self, first: bytes, cwd: str) -> None:
        """Start the worker and send its first message."""
        import subprocess
        import sys
        import threading

        command = [sys.executable, "-P", "-m", "lorasmith.runs.worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, bufsize=0)
        self.send(first)
        readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_lines)]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._wait, args=(readers,), daemon=True).start()

    def send(self, packed: bytes) -> None:
        """Pass a message on; it is lost if the worker has ended."""
        import contextlib

        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(packed)
            self._process.stdin.flush()

    def close(self) -> None:
        """Close the worker's input, on which it saves and ends."""
        import contextlib

        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def receive(self, seconds: float) -> tuple[list[tuple[str, Any, bytes]], str]:
        """What arrived, waiting up to `seconds` for it, `("message", head, body)` and `("line", text, b"")`; and how
        the worker ended, empty if it runs.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._messages or self._ended, seconds)
            found = list(self._messages)
            self._messages.clear()
            return found, self._ended

    def _put(self, *message: Any) -> None:
        with self._arrived:
            self._messages.append(message)
            self._arrived.notify_all()

    def _read(self) -> None:
        import io

        from lorasmith.runs.child_process import BlockingChannel

        channel = BlockingChannel(io.BufferedReader(self._process.stdout), io.BytesIO())
        while (message := channel.receive()) is not None:
            self._put("message", *message)

    def _read_lines(self) -> None:
        for line in self._process.stderr:
            self._put("line", line.decode(errors="backslashreplace").rstrip(), b"")

    def _wait(self, readers: Any) -> None:
        code = self._process.wait()
        for reader in readers:
            reader.join(2)
        with self._arrived:
            self._ended = f"it ended with exit status {code}" if code >= 0 else f"it was ended by signal {-code}"
            self._arrived.notify_all()


class _Bridge:
    """One worker of a supervisor."""

    def __init__(self, places: RayPlaces, channel: BlockingChannel, start: dict[str, Any]) -> None:
        self._places = places
        self._channel = channel
        self._start = start
        self._is_placed = threading.Event()
        self._is_closed = threading.Event()  # the supervisor has exited, or wants this to end
        self._waiting: list[Message] = []  # what came before there was a worker
        self._actor: Any = None
        self._lock = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._forward, daemon=True).start()
        with self._alone() as is_alone:
            if is_alone:
                # With the lock no worker of an earlier supervisor is left, so that others need not wait for a place.
                self._channel.send({"type": "loading"})
                with connected(self._places) as ray:
                    self._work(ray)

    def _work(self, ray: Any) -> None:
        kind = ray.remote(max_restarts=0, max_concurrency=4, **self._places.resources)(RemoteWorker)
        actor = kind.remote()
        machine = self._placed(ray, actor.machine.remote())
        if machine is None:
            ray.kill(actor)
            return
        if fault := version_fault(machine["name"], versions(), machine["versions"]):
            raise LorasmithError(fault)
        device = "cpu" if self._places.cpus else "cuda:0"  # Ray shows a worker its GPU alone
        first = {**self._start, "lock": None, "device": device}
        ray.get(actor.start.remote(_packed((first, b"")), str(self._start["base"])))
        with self._lock:
            self._actor = actor
            for message in self._waiting:
                actor.send.remote(_packed(message))
            if self._is_closed.is_set():
                actor.close.remote()
        self._is_placed.set()
        self._receive(ray, actor, machine["name"])

    def _placed(self, ray: Any, asked: Any) -> dict[str, Any] | None:
        """The machine that Ray chose; None if the supervisor exits before."""
        since = time.monotonic()
        while not self._is_closed.is_set():
            if ray.wait([asked], timeout=_POLL_S)[0]:
                found: dict[str, Any] = ray.get(asked)
                return found
            if time.monotonic() - since > _STARTING_S:
                since = time.monotonic()
                _say(f"no machine of the cluster at {self._places.address} has room for a worker; it waits for one")
        return None

    def _receive(self, ray: Any, actor: Any, machine: str) -> None:
        while True:
            messages, ended = ray.get(actor.receive.remote(_POLL_S))
            for kind, head, body in messages:
                if kind == "line":
                    _say(head)
                    continue
                if head["type"] == "ready":
                    head = {**head, "device": {**head.get("device", {}), "title": f"{self._title()} on {machine}"}}
                with contextlib.suppress(OSError):  # the supervisor has exited, and the worker is told
                    self._channel.send(head, body)
            if ended and not messages:
                if not self._is_closed.is_set():
                    raise LorasmithError(f"the worker on {machine} ended: {ended}")
                return

    def _title(self) -> str:
        return f"{self._places.cpus} cores" if self._places.cpus else "GPU"

    def _forward(self) -> None:
        """Pass the supervisor's messages on, and its end."""
        while (message := self._channel.receive()) is not None:
            with self._lock:
                if self._actor is None:
                    self._waiting.append(message)
                else:
                    self._actor.send.remote(_packed(message))
        with self._lock:
            self._is_closed.set()
            if self._actor is not None:
                self._actor.close.remote()
        time.sleep(float(self._start["grace_s"]) + _MARGIN_S)
        os._exit(1)

    def _beat(self) -> None:
        """Send heartbeats until the worker does."""
        while not self._is_placed.wait(self._start["beat_s"]):
            with contextlib.suppress(OSError):
                self._channel.send({"type": "beat"})

    @contextlib.contextmanager
    def _alone(self) -> Any:
        """Inside the context, no other bridge has this worker's lock; yields False if the supervisor exits first."""
        name, is_told = self._start.get("lock"), False
        while name is not None and not self._is_closed.is_set():
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(locked(Path(name), "locked"))
                except OutputError as error:
                    if not str(error).startswith("locked"):
                        raise
                else:
                    yield True
                    return
            if not is_told:
                self._channel.send({"type": "waiting"})
                is_told = True
            time.sleep(_LOCK_PAUSE_S)
        yield name is None


def _packed(message: Message) -> bytes:
    from lorasmith.runs.child_process import packed

    return packed(*message)


def _say(text: str) -> None:
    sys.stderr.write(f"{printable(text, limit=4000)}\n")
    sys.stderr.flush()


def main() -> None:
    """Carry messages until the worker or the supervisor ends."""
    channel = channel_of_child()
    started = channel.receive()
    if started is None:
        return
    code = 0
    try:
        _Bridge(RayPlaces.parse(sys.argv[1]), channel, started[0]).run()
    except LorasmithError as error:
        _say(str(error))
        code = 1
    except Exception as error:  # Ray's, when a machine or the head is lost
        _say(f"the machine of the worker was lost ({type(error).__name__}: {one_line_of(error)[:300]})")
        code = 1
    os._exit(code)


if __name__ == "__main__":
    main()
