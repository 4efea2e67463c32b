from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lorasmith.server import log_tail
from lorasmith.server.log_tail import LogTail, end_of_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def read(tail: LogTail) -> list[object]:
    return [event.data.get("n") for event in tail.read()]


def test_complete_lines_are_read_once(log: Path) -> None:
    tail = LogTail(log)
    assert read(tail) == []  # it is not there yet
    log.write_text('{"n": 1}\n{"n": 2}\n{"n":')
    assert read(tail) == [1, 2] and read(tail) == []
    with log.open("a") as file:
        file.write(" 3}\n")
    assert read(tail) == [3]
    assert not tail.begins_again


def test_reading_continues_behind_an_event(log: Path) -> None:
    log.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    first, *_ = LogTail(log).read()
    assert read(LogTail(log, first.place)) == [2, 3]
    assert read(LogTail(log, end_of_log(log))) == []


@pytest.mark.parametrize("place", ["", "x", "1-x", "-5", "1-", "999999999-10", "1-1-1"])
def test_a_place_that_is_none_begins_at_the_start(log: Path, place: str) -> None:
    log.write_text('{"n": 1}\n')
    assert read(LogTail(log, place)) == [1]


def test_a_log_that_is_written_again_begins_again(log: Path) -> None:
    log.write_text('{"n": 1}\n{"n": 2}\n')
    tail = LogTail(log)
    tail.read()
    other = log.with_suffix(".new")
    other.write_text('{"n": 1}\n')
    other.replace(log)
    assert read(tail) == [1] and tail.begins_again
    log.write_text("")
    assert read(tail) == []
    with log.open("a") as file:
        file.write('{"n": 5}\n')
    assert read(tail) == [5]


def test_what_is_no_event_is_left_out_and_numbers_are_finite(log: Path) -> None:
    lines = [b'{"n": 1, "loss": NaN, "high": 1e999}', b"[1]", b"junk", b"\xff", b"[" * 5000, b'{"n": "a\\nb"}']
    log.write_bytes(b"\n".join(lines) + b"\n")
    events = LogTail(log).read()
    assert [event.data for event in events] == [{"n": 1, "loss": None, "high": None}, {"n": "a\nb"}]


def test_large_logs_are_read_in_blocks(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tail, "_BLOCK", 64)
    log.write_text("".join(f'{{"n": {number}}}\n' for number in range(50)) + f'{{"n": "{"x" * 200}"}}\n{{"n": 99}}\n')
    tail, found = LogTail(log), []
    while events := tail.read():
        assert len(events) < 12
        found += [event.data["n"] for event in events]
    assert found == [*range(50), "x" * 200, 99]


def test_what_is_no_place_is_the_start(log: Path) -> None:
    log.write_text('{"n": 1}\n')
    for place in ("", "x", "1", "1-x", "-1-1", f"{'9' * 5000}-1", f"1-{'9' * 5000}"):
        assert [event.data["n"] for event in LogTail(log, place).read()] == [1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(log: Path) -> None:
    os.mkfifo(log)
    reading = threading.Thread(target=LogTail(log).read, daemon=True)
    reading.start()
    reading.join(5)
    assert not reading.is_alive()


def test_a_log_that_is_not_there_has_no_end(log: Path) -> None:
    assert end_of_log(log) == ""
