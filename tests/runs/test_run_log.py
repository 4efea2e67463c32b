"""What a run's log adds up to, read on from where it was read to."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorasmith.core.cancellation import answering
from lorasmith.core.errors import CancelledError, TrainingError
from lorasmith.runs import run_log, view
from lorasmith.runs.advice import losses_by_image
from lorasmith.runs.run_log import RunLog, followed, read_run, view_of_log
from lorasmith.runs.view import RunView
from lorasmith.training.events import MOST_LINE_BYTES, Event, Outcome, RolledBack, RunFinished, StepDone, encoded
from lorasmith.training.storage.records import EVENTS
from tests.launched import LONG_S
from tests.training.run_cases import BEGIN, started, steps_done, write_run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def step(number: int) -> str:
    return encoded(StepDone(step=number, loss=0.5, grad_norm=1.0)) + "\n"


def steps(tail: RunLog) -> list[int]:
    tail.read()
    return [one.step for one in tail.view.points]


def test_complete_lines_are_read_once(log: Path) -> None:
    tail = RunLog(log.parent, ())
    assert steps(tail) == []  # it is not there yet
    log.write_text(step(1) + step(2) + step(3)[:20])
    assert steps(tail) == [1, 2] and steps(tail) == [1, 2]
    with log.open("a") as file:
        file.write(step(3)[20:])
    assert steps(tail) == [1, 2, 3]


def test_a_log_that_is_written_again_begins_again(log: Path) -> None:
    log.write_text(step(1) + step(2))
    tail = RunLog(log.parent, ())
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
    assert steps(RunLog(log.parent, ())) == [7]


def test_what_is_kept_of_a_log_has_a_limit(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MOST_EVENTS", 2)
    log.write_text("".join(map(step, range(1, 6))))
    assert steps(RunLog(log.parent, ())) == [1, 2]


def test_a_log_that_is_asked_for_again_is_read_on(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_text(step(1))
    assert view_of_log(log.parent)["step"] == 1
    read: list[int] = []
    real = run_log.decoded
    monkeypatch.setattr(run_log, "decoded", lambda line: read.append(len(line)) or real(line))  # type: ignore[func-returns-value]
    with log.open("a") as file:
        file.write(step(2))
    assert view_of_log(log.parent)["step"] == 2 and len(read) == 1


def test_threads_that_ask_at_once_take_each_event_once(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_text("".join(map(step, range(1, 31))))
    real, together = run_log.decoded, threading.Barrier(2)

    def decoded(line: bytes) -> Event:
        with contextlib.suppress(threading.BrokenBarrierError):  # another thread is here too, if it may be
            together.wait(0.1)
        return real(line)

    monkeypatch.setattr(run_log, "decoded", decoded)
    taken = []
    monkeypatch.setattr(RunView, "take", lambda view, event: taken.append(event.step))  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(view_of_log, [log.parent, log.parent]))
    assert taken == list(range(1, 31))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(log: Path) -> None:
    os.mkfifo(log)
    with ThreadPoolExecutor() as threads, pytest.raises(TrainingError, match="named pipe"):
        threads.submit(RunLog(log.parent, ()).read).result(LONG_S)


def test_lines_that_are_no_events_are_counted_as_they_come(log: Path) -> None:
    tail = RunLog(log.parent, ())
    counts = []
    for more in (
        b"junk\n" + step(1).encode(),
        step(2).encode()[:9],
        step(2).encode()[9:],
        b"x" * MOST_LINE_BYTES,
        b"x\n",
    ):
        with log.open("ab") as file:
            file.write(more)
        counts.append((steps(tail), tail.unreadable))
    assert counts == [([1], 1), ([1], 2), ([1, 2], 1), ([1, 2], 2), ([1, 2], 2)]
    log.write_text(step(1) + step(2).strip())  # as a kill between the two leaves it
    assert (steps(tail), tail.unreadable) == ([1, 2], 0)


def test_the_sums_of_a_log_that_was_continued_are_those_of_all_of_it(tmp_path: Path) -> None:
    back = RolledBack(step=6, to_step=4, images=(), rate_factor=0.5, message="x", at=BEGIN)
    end = RunFinished(step=9, reason=Outcome.FINISHED, at=BEGIN)
    events = [started(9), *steps_done(1, 6, total=9), back, *steps_done(5, 9, total=9), end]
    folder = write_run(tmp_path, [])
    for number in range(0, len(events), 4):
        with (folder / EVENTS).open("a") as file:
            file.writelines(encoded(event) + "\n" for event in events[number : number + 4])
        with followed(folder) as run:
            read = run
    whole = read_run(folder)
    assert read.view.to_json() == whole.view.to_json() and read.view.faults == [6]
    assert str(losses_by_image(read)) == str(losses_by_image(whole)) and losses_by_image(whole)[1][0].draws == 9 * 4
    assert read.log.starts == whole.log.starts == events[:1]


def test_a_long_run_keeps_a_part_of_its_steps(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_MOST_POINTS", 10)
    log.write_text("".join(map(step, range(1, 40))))
    tail = RunLog(log.parent, ())
    assert steps(tail) == [*range(4, 40, 4), 39]
    with log.open("a") as file:
        file.write("".join(map(step, range(40, 43))))
    assert steps(tail) == [*range(8, 41, 8), 42] and tail.view.loss.steps == 10


def test_reading_ends_when_nobody_waits_and_is_continued(log: Path) -> None:
    log.write_text("".join(map(step, range(1, 2000))))
    tail, given_up = RunLog(log.parent, ()), threading.Event()
    with answering(given_up):
        given_up.set()
        with pytest.raises(CancelledError):
            tail.read()
    assert tail.size_bytes < log.stat().st_size
    assert len(steps(tail)) == 1999


def test_logs_are_forgotten_when_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "_kept", {})
    monkeypatch.setattr(run_log, "_MOST_KEPT_BYTES", 3.5 * len(step(1)))
    for name in "abcdbe":
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / EVENTS).write_text(step(1))
        view_of_log(tmp_path / name)
    assert [place.name for place in run_log._kept] == ["d", "b", "e"]
