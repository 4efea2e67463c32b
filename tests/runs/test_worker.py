"""The worker process without its jobs: messages, the end of the server, locks, and failures in sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.cancellation import check_wanted, report_progress
from lorasmith.core.errors import CancelledError, DataError
from lorasmith.core.files import locked
from lorasmith.runs import worker
from lorasmith.runs.child_process import BlockingChannel
from tests.launched import LONG_S

START = {"log": "the.log", "grace_s": 60.0, "beat_s": 60.0, "kinds": "runs", "device": "cpu"}


class FakeKind:
    """Jobs that do what their requests say."""

    def __init__(self, work: worker.Work) -> None:
        self.work = work
        self.freed = 0
        self.is_device_broken = False
        self.waiting = threading.Event()

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: worker.Ended) -> None:
        for job in jobs:
            ended(job["id"], worker.how_it_ended(partial(self.act, job["request"]["do"]), job=job["id"], log="the.log"))

    def act(self, do: str) -> dict[str, Any]:
        match do:
            case "wait":
                self.waiting.set()
                assert self.work.cancelled.wait(LONG_S)
                raise CancelledError("it was cancelled")
            case "data":
                raise DataError("the images must be images, got none; add some")
            case "memory":
                raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
            case "bug":
                raise ZeroDivisionError("by zero\x1b[2J")
            case "break":
                self.is_device_broken = True
                raise RuntimeError("CUDA error: an illegal memory access")
        return {"outputs": {"freed": self.freed}}

    def free(self) -> None:
        self.freed += 1


class Ends:
    """The supervisor's end of a worker that runs in a thread of this process."""

    kind: FakeKind

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
        job = {"id": id, "kind": "train", "request": {"do": do}, "run": None}
        self.channel.send({"type": "jobs", "jobs": [job]})

    def end_of(self, do: str) -> dict[str, Any]:
        self.start(do)
        end = self.receive()
        assert end["type"] == "ended"
        return end

    def ready(self) -> None:
        assert self.receive() == {"type": "ready", "device": {"free_bytes": 1}}

    def close(self) -> None:
        self.channel._outgoing.close()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()
        for stream in (self.channel._incoming, self.worker._incoming, self.worker._outgoing):
            stream.close()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    def kinds(work: worker.Work) -> dict[str, FakeKind]:
        Ends.kind = FakeKind(work)
        return {"train": Ends.kind}

    monkeypatch.setattr("lorasmith.runs.training_jobs.job_kinds", kinds)
    monkeypatch.setattr(worker, "_memory", lambda device: {"free_bytes": 1})
    monkeypatch.setattr(worker, "_is_usable", lambda device: not Ends.kind.is_device_broken)
    both = Ends()
    yield both
    both.close()


def test_a_worker_survives_whatever_a_job_raises(ends: Ends) -> None:
    found = ends.end_of("data")
    assert (found["state"], found["id"]) == ("failed", "j")
    assert found["error"] == {"kind": "DataError", "message": "the images must be images, got none; add some"}
    ends.ready()
    memory = ends.end_of("memory")["error"]
    assert memory["kind"] == "OutOfMemory" and "smaller resolution" in memory["message"]
    ends.ready()
    bug = ends.end_of("bug")["error"]
    assert bug["kind"] == "InternalError" and "the.log" in bug["message"] and "\x1b" not in bug["message"]
    assert "ZeroDivisionError" in bug["traceback"][-1]
    ends.ready()
    ends.channel.send({"type": "free"})
    found = ends.end_of("finish")
    assert (found["state"], found["outputs"]) == ("completed", {"freed": 2})
    ends.ready()


def test_jobs_that_train_together_end_one_by_one(ends: Ends) -> None:
    jobs = [{"id": do, "kind": "train", "request": {"do": do}, "run": None} for do in ("data", "finish", "bug")]
    ends.channel.send({"type": "jobs", "jobs": jobs})
    assert [(end["id"], end["state"]) for end in (ends.receive() for _ in jobs)] == [
        ("data", "failed"), ("finish", "completed"), ("bug", "failed"),
    ]  # fmt: skip
    ends.ready()


def test_a_cancel_stops_the_job_that_it_names(ends: Ends) -> None:
    ends.start("wait", "first")
    assert Ends.kind.waiting.wait(LONG_S)
    ends.channel.send({"type": "cancel", "id": "other"})
    time.sleep(0.05)
    assert not ends.inbox.cancel.is_set()
    ends.channel.send({"type": "cancel", "id": "first"})
    found = ends.receive()
    assert (found["id"], found["state"]) == ("first", "cancelled")
    ends.ready()
    assert ends.end_of("finish")["state"] == "completed", "the next job is not cancelled"


def test_a_worker_whose_device_is_broken_reports_and_ends(ends: Ends) -> None:
    found = ends.end_of("break")
    assert found["state"] == "failed"
    ends.thread.join(LONG_S)
    assert not ends.thread.is_alive()


def test_the_end_of_the_server_is_a_cancel(ends: Ends) -> None:
    ends.start("wait")
    assert Ends.kind.waiting.wait(LONG_S)
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
    with worker._alone(str(lock), Channel(), inbox, grace_s=60) as is_alone:  # type: ignore[arg-type]
        assert is_alone
        assert (tmp_path / "worker-0.pid").read_text() == str(os.getpid())
    assert sent == [{"type": "waiting"}]
    inbox.is_closed = True
    with worker._alone(str(lock), Channel(), inbox, grace_s=60) as is_alone:  # type: ignore[arg-type]
        assert not is_alone


def test_a_worker_that_neither_ends_nor_answers_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "worker-0.pid"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "lorasmith.runs.worker"])
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


def test_devices_report_their_memory() -> None:
    cpu = worker.device_of({"device": "cpu"})
    assert 0 < worker._memory(cpu)["free_bytes"] <= worker._memory(cpu)["memory_bytes"]
    assert worker._is_usable(cpu) and not worker._is_usable(torch.device("meta"))


def test_a_question_is_given_up_where_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, is_asked = threading.Event(), threading.Event()

    def answer(question: str, arguments: Any) -> str:
        is_asked.set()
        while question == "long":
            check_wanted()
            answered.wait(0.01)
        for done in range(1, 1001):
            report_progress(done, 1000)
        return question

    monkeypatch.setattr("lorasmith.runs.training_jobs.answers", lambda start: answer, raising=False)
    monkeypatch.setattr(worker, "_THREADS", 1)
    (there, to), (from_, back) = os.pipe(), os.pipe()
    channel = BlockingChannel(os.fdopen(from_, "rb"), os.fdopen(to, "wb"))
    mine = BlockingChannel(os.fdopen(there, "rb"), os.fdopen(back, "wb"))
    inbox = worker._Inbox(mine, grace_s=60.0, overdue=lambda: None)
    thread = threading.Thread(target=worker._work, args=(mine, {**START, "device": None}, inbox))
    thread.start()
    try:
        assert channel.receive() == ({"type": "ready"}, b"")
        for number, question in enumerate(("long", "waiting", "short"), start=1):
            channel.send({"type": "ask", "number": number, "question": question, "arguments": {}})
        assert is_asked.wait(LONG_S)
        for number in (2, 1):
            channel.send({"type": "give up", "number": number})
        answers: list[dict[str, Any]] = []
        progress: list[dict[str, Any]] = []
        while len(answers) < 3 and (found := channel.receive()) is not None:
            (answers if found[0]["type"] == "answer" else progress).append(found[0])
        assert progress[-1] == {"type": "progress", "number": 3, "done": 1000, "total": 1000}
        assert len(progress) < 1000, "a few a second"
        assert [one.get("result", one.get("error", {}).get("kind")) for one in answers] == [
            "CancelledError",
            "CancelledError",  # which had not begun
            "short",
        ]
    finally:
        channel._outgoing.close()
        thread.join(LONG_S)
        for stream in (channel._incoming, mine._incoming, mine._outgoing):
            stream.close()
