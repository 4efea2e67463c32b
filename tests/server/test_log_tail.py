from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorasmith.runs.view import RunView
from lorasmith.server import log_tail
from lorasmith.server.log_tail import LogTail, view_of_log
from lorasmith.training.events import MOST_LINE_BYTES, Event, StepDone, encoded
from tests.launched import LONG_S


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def step(number: int) -> str:
    return encoded(StepDone(step=number, loss=0.5, grad_norm=1.0)) + "\n"


def steps(tail: LogTail) -> list[int]:
    tail.read()
    return [one.step for one in tail.view.points]


def test_complete_lines_are_read_once(log: Path) -> None:
    tail = LogTail(log)
    assert steps(tail) == []  # it is not there yet
    log.write_text(step(1) + step(2) + step(3)[:20])
    assert steps(tail) == [1, 2] and steps(tail) == [1, 2]
    with log.open("a") as file:
        file.write(step(3)[20:])
    assert steps(tail) == [1, 2, 3]


def test_a_log_that_is_written_again_begins_again(log: Path) -> None:
    log.write_text(step(1) + step(2))
    tail = LogTail(log)
    assert steps(tail) == [1, 2]
    other = log.with_suffix(".new")
    other.write_text(step(1))
    other.replace(log)
    assert steps(tail) == [1]
    log.write_text("")
    assert steps(tail) == []
    with log.open("a") as file:
        file.write(step(5))
    assert steps(tail) == [5]


def test_what_is_no_event_is_left_out(log: Path) -> None:
    lines = [b"[1]", b"junk", b"\xff", b"[" * 5000, b"x" * (MOST_LINE_BYTES + 9), step(7).encode().strip()]
    log.write_bytes(b"\n".join(lines) + b"\n")
    assert steps(LogTail(log)) == [7]


def test_what_is_kept_of_a_log_has_a_limit(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tail, "MOST_EVENTS", 2)
    log.write_text("".join(map(step, range(1, 6))))
    assert steps(LogTail(log)) == [1, 2]


def test_a_log_that_is_asked_for_again_is_read_on(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_text(step(1))
    assert view_of_log(log)["step"] == 1
    read: list[int] = []
    real = log_tail.decoded
    monkeypatch.setattr(log_tail, "decoded", lambda line: read.append(len(line)) or real(line))  # type: ignore[func-returns-value]
    with log.open("a") as file:
        file.write(step(2))
    assert view_of_log(log)["step"] == 2 and len(read) == 1


def test_threads_that_ask_at_once_take_each_event_once(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_text("".join(map(step, range(1, 31))))
    real, together = log_tail.decoded, threading.Barrier(2)

    def decoded(line: str) -> Event:
        with contextlib.suppress(threading.BrokenBarrierError):  # another thread is here too, if it may be
            together.wait(0.1)
        return real(line)

    monkeypatch.setattr(log_tail, "decoded", decoded)
    taken = []
    monkeypatch.setattr(RunView, "take", lambda view, event: taken.append(event.step))  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(view_of_log, [log, log]))
    assert taken == list(range(1, 31))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(log: Path) -> None:
    os.mkfifo(log)
    reading = threading.Thread(target=LogTail(log).read, daemon=True)
    reading.start()
    reading.join(LONG_S)
    assert not reading.is_alive()
