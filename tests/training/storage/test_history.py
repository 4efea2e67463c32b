"""A run's log read back, as it was written and as a kill, a full disk or a stranger left it."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import read_regular
from lorasmith.training.events import (
    MOST_LINE_BYTES,
    Outcome,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    decoded,
    encoded,
)
from lorasmith.training.storage.records import read_history
from lorasmith.training.storage.run_folder import RunFolder
from tests.training.run_cases import BEGIN, started, steps_done, whole_run, write_run


def step(number: int, loss: float = 0.3, at: float = BEGIN) -> StepDone:
    return StepDone(step=number, loss=loss, grad_norm=0.1, at=at)


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    events = (started(3), *steps_done(1, 3, total=3), RunFinished(step=3, reason=Outcome.FINISHED, at=BEGIN))
    history = read_history(write_run(tmp_path, events))
    bare = tuple(replace(one, draws=()) if isinstance(one, StepDone) else one for one in events)
    assert history.events == bare and history.unreadable == 0
    assert history.of(RunStarted) == [events[0]]
    assert history.record.title == "fox"


def test_every_kind_of_event_comes_back(tmp_path: Path) -> None:
    history = read_history(whole_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [json.loads(encoded(event)) for event in history.events] == [
        {**line, "draws": []} if "draws" in line else line for line in lines
    ]
    assert len({line["event"] for line in lines}) == 8


GOOD = json.loads(encoded(step(2)))
BROKEN = {
    "half a line": json.dumps(GOOD)[:40],
    "no object": "[1, 2]",
    "no event": "{}",
    "another event": json.dumps({**GOOD, "event": "Exploded"}),
    "a base class": json.dumps({"event": "Event", "at": 1.0}),
    "a field is missing": '{"event": "StepDone", "step": 2}',
    "text for a number": json.dumps({**GOOD, "loss": "low"}),
    "step zero": json.dumps({**GOOD, "step": 0}),
    "a step beyond all runs": json.dumps({**GOOD, "step": 10**12}),
    "text for a list": json.dumps({**GOOD, "draws": "none"}),
    "an unknown outcome": json.dumps({"event": "RunFinished", "at": 1.0, "step": 1, "reason": "bored"}),
    "no time": json.dumps({**GOOD, "at": math.nan}),
    "a time in a million years": json.dumps({**GOOD, "at": 1e15}),
    "draws of two": json.dumps({**GOOD, "draws": [[0, 0.5]]}),
    "draws of text": json.dumps({**GOOD, "draws": [["0", 0.5, 0.1]]}),
    "draws of none": json.dumps({**GOOD, "draws": [0]}),
    "draws of letters": json.dumps({**GOOD, "draws": ["abc"]}),
    "draws beyond 64 bits": json.dumps({**GOOD, "draws": [[0, 0.5, 10**400]]}),
    "a line of megabytes": "[" + " " * MOST_LINE_BYTES,
    "a later version": json.dumps({**GOOD, "version": 2}),
    "no version": json.dumps({**GOOD, "version": "1"}),
    "bytes": "\x00\x01\ufffd",
    "deep": "[" * 100_000,
}


def test_what_cannot_be_read_is_counted_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, [])
    for case, broken in BROKEN.items():
        lines = [encoded(step(1)), broken, "", encoded(step(3))]
        (tmp_path / "events.jsonl").write_text("\n".join(lines), encoding="utf-8")
        history = read_history(tmp_path)
        assert ([event.step for event in history.of(StepDone)], history.unreadable) == ([1, 3], 1), case


@given(st.binary(max_size=200))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = write_run(tmp_path_factory.mktemp("run"), [])
    (folder / "events.jsonl").write_bytes(content)
    assert len(read_history(folder).events) == 0


def test_a_loss_that_is_no_number_and_fields_of_later_versions_are_read(tmp_path: Path) -> None:
    [found] = read_history(write_run(tmp_path, [step(1, math.nan)])).of(StepDone)
    assert math.isnan(found.loss)
    (tmp_path / "events.jsonl").write_text(json.dumps({**GOOD, "mood": "good"}))
    assert read_history(tmp_path).unreadable == 0


def test_why_a_run_ended(tmp_path: Path) -> None:
    end = RunFinished(step=1, reason=Outcome.CANCELLED, at=BEGIN)
    assert read_history(write_run(tmp_path, [started(9), step(1), end, Warned(message="x", at=BEGIN)])).outcome == (
        "cancelled"
    )
    assert read_history(write_run(tmp_path, [started(9), step(1), end, started(9), step(2)])).outcome is None
    assert read_history(write_run(tmp_path, [])).outcome is None


def test_a_log_larger_than_any_other_text_file_is_read_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [started(9), *steps_done(1, 2000, total=2000), RunFinished(step=2000, reason=Outcome.CANCELLED, at=BEGIN)]
    folder = RunFolder(write_run(tmp_path, events))
    log = tmp_path / "events.jsonl"
    with log.open("a") as file:
        file.write(encoded(events[1])[:50])  # torn
    monkeypatch.setitem(read_regular.__kwdefaults__, "at_most", (size := log.stat().st_size) // 2)
    tracemalloc.start()
    try:
        assert folder.outcome() == Outcome.CANCELLED
        folder.rewind(300)
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()
    assert folder.outcome() is None
    found = read_history(tmp_path)
    assert (len(found.of(StepDone)), found.unreadable) == (300, 0)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^a run folder must contain run\.json, got .*; name one such as"):
        read_history(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_a_broken_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(TrainingError, match=r"run\.json cannot be read \(.*restore it from a copy"):
        read_history(tmp_path)


def test_text_of_events_is_printable() -> None:
    event = decoded(encoded(Warned(message="a\x1b[2J\nb" + "x" * 10**6)).encode())

    assert isinstance(event, Warned)
    assert event.message.startswith(r"a\u001b[2J\nbxxx")
    assert len(event.message) == 10_000
