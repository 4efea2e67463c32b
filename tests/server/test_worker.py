"""The worker process without its jobs: messages, the end of the server, locks, and failures in sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import CancelledError, DataError
from lorasmith.core.files import locked
from lorasmith.server import worker
from lorasmith.server.child_process import BlockingChannel
from tests.launched import LONG_S

START = {"log": "the.log", "grace_s": 60.0, "beat_s": 60.0}


class FakeJobs:
    """What `worker_jobs.Jobs` does, as each job says."""

    is_device_broken = False
    cancel: threading.Event
    waiting: threading.Event

    def __init__(self, channel: Any, start: Any, *, cancel: threading.Event) -> None:
        FakeJobs.cancel, FakeJobs.waiting = cancel, threading.Event()
        self.freed: list[tuple[bool, bool]] = []

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        match message["request"]["do"]:
            case "wait":
                self.waiting.set()
                assert self.cancel.wait(LONG_S)
                raise CancelledError("it was cancelled")
            case "data":
                raise DataError("the images must be images, got none; add some")
            case "memory":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            case "bug":
                raise ZeroDivisionError("by zero\x1b[2J")
            case "break":
                FakeJobs.is_device_broken = True
                raise RuntimeError("CUDA error: an illegal memory access")
        return {"outputs": {"freed": self.freed}}

    def rest(self, end: Any) -> dict[str, Any]:
        return {"messages": [["m", {}]]}

    def free(self, *, models: bool, memory: bool) -> None:
        self.freed.append((models, memory))

    def device(self) -> dict[str, Any]:
        return {"free_bytes": 1}

    def is_broken(self) -> bool:
        return FakeJobs.is_device_broken


class Ends:
    """The server's end of a worker that runs in a thread of this process."""

    def __init__(self) -> None:
        (there, self._to), (self._from, back) = os.pipe(), os.pipe()
        self.channel = BlockingChannel(os.fdopen(self._from, "rb"), os.fdopen(self._to, "wb"))
        self.worker = BlockingChannel(os.fdopen(there, "rb"), os.fdopen(back, "wb"))
        self.inbox = worker._Inbox(self.worker, grace_s=60.0, overdue=lambda: None)
        self.thread = threading.Thread(target=worker._work, args=(self.worker, START, self.inbox))
        self.thread.start()
        assert self.receive() == {"type": "ready", "device": {"free_bytes": 1}}

    def receive(self) -> dict[str, Any]:
        message = self.channel.receive()
        assert message is not None
        return message[0]

    def start(self, do: str, id: str = "j") -> None:
        self.channel.send({"type": "job", "id": id, "kind": "train", "request": {"do": do}, "run": None})

    def end_of(self, do: str) -> dict[str, Any]:
        self.start(do)
        return self.receive()

    def close(self) -> None:
        self.channel._outgoing.close()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()
        for stream in (self.channel._incoming, self.worker._incoming, self.worker._outgoing):
            stream.close()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr("lorasmith.server.worker_jobs.Jobs", FakeJobs)
    monkeypatch.setattr(FakeJobs, "is_device_broken", False)
    both = Ends()
    yield both
    both.close()


def test_a_worker_survives_whatever_a_job_raises(ends: Ends) -> None:
    found = ends.end_of("data")
    assert (found["state"], found["id"], found["messages"]) == ("failed", "j", [["m", {}]])
    assert found["error"] == {"kind": "DataError", "message": "the images must be images, got none; add some"}
    memory = ends.end_of("memory")["error"]
    assert memory["kind"] == "OutOfMemory" and "smaller resolution" in memory["message"]
    bug = ends.end_of("bug")["error"]
    assert bug["kind"] == "InternalError" and "the.log" in bug["message"] and "\x1b" not in bug["message"]
    assert "ZeroDivisionError" in bug["traceback"][-1]
    ends.channel.send({"type": "free", "models": True, "memory": False})
    found = ends.end_of("finish")
    assert (found["state"], found["outputs"]) == ("completed", {"freed": [[True, True], [True, False]]})
    assert found["device"] == {"free_bytes": 1}


def test_a_cancel_stops_the_job_that_it_names(ends: Ends) -> None:
    ends.start("wait", "first")
    assert FakeJobs.waiting.wait(LONG_S)
    ends.channel.send({"type": "cancel", "id": "other"})
    time.sleep(0.05)
    assert not FakeJobs.cancel.is_set()
    ends.channel.send({"type": "cancel", "id": "first"})
    found = ends.receive()
    assert (found["id"], found["state"]) == ("first", "cancelled")
    assert ends.end_of("finish")["state"] == "completed", "the next job is not cancelled"


def test_a_worker_whose_device_is_broken_reports_and_ends(ends: Ends) -> None:
    found = ends.end_of("break")
    assert (found["state"], found["device"]) == ("failed", {})
    ends.thread.join(LONG_S)
    assert not ends.thread.is_alive()


def test_the_end_of_the_server_is_a_cancel(ends: Ends) -> None:
    ends.start("wait")
    assert FakeJobs.waiting.wait(LONG_S)
    ends.channel._outgoing.close()
    assert ends.receive()["state"] == "cancelled", "the server may still read"
    ends.thread.join(LONG_S)
    assert not ends.thread.is_alive()


def test_a_worker_waits_for_that_of_another_server(tmp_path: Path) -> None:
    lock, sent = tmp_path / "worker-0.lock", []
    taken = locked(lock, "held")

    class Channel:
        def send(self, head: dict[str, Any]) -> None:
            sent.append(head)
            taken.__exit__(None, None, None)

    class Inbox:
        is_closed = False

    inbox = Inbox()
    taken.__enter__()
    with worker._alone(lock, Channel(), inbox, grace_s=60) as is_alone:  # type: ignore[arg-type]
        assert is_alone
        assert (tmp_path / "worker-0.pid").read_text() == str(os.getpid())
    assert sent == [{"type": "waiting"}]
    inbox.is_closed = True
    with worker._alone(lock, Channel(), inbox, grace_s=60) as is_alone:  # type: ignore[arg-type]
        assert not is_alone


def test_a_worker_that_neither_ends_nor_answers_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "worker-0.pid"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "lorasmith.server.worker"])
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for process in (stranger, other):
            note.write_text(str(process.pid))
            worker._end_other(note)
        assert other.wait(LONG_S) != 0
        assert stranger.poll() is None, "another program has the number now"
        note.write_text("nonsense")
        worker._end_other(note)
    finally:
        stranger.kill()
        stranger.wait()
