"""The list of runs reads what it shows, once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.core.folders import Folders
from lorasmith.runs import run_log
from lorasmith.server.runs import run_answers, run_list_answers
from lorasmith.training.events import RunFinished, StepDone, encoded
from tests.server.pages.run_folders import write_evaluation, write_finished_run
from tests.training.run_cases import BEGIN, started, steps_done, write_run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Six runs, `runs/fox-0` the oldest."""
    for number in range(6):
        folder = write_run(
            tmp_path / "runs" / f"fox-{number}", [started(3, at=BEGIN + number), *steps_done(1, 3, total=3)]
        )
        os.utime(folder / "run.json", (BEGIN + number, BEGIN + number))
    return tmp_path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The lines of logs that are parsed."""
    lines: list[bytes] = []
    real = run_log.decoded
    monkeypatch.setattr(run_log, "decoded", lambda line: lines.append(line) or real(line))  # type: ignore[func-returns-value]
    monkeypatch.setattr(run_log, "_kept", {})
    monkeypatch.setattr(run_list_answers, "_known", {})
    return lines


def names(base: Path, limit: int | None = None) -> list[str]:
    return [row.id.removeprefix("runs/") for row in run_list_answers.runs(Folders(base), limit=limit).runs]


def test_a_part_of_the_list_reads_its_rows_alone_and_once(base: Path, parsed: list[bytes]) -> None:
    assert names(base, 2) == ["fox-5", "fox-4"] and len(parsed) == 2 * 4
    assert names(base, 2) == ["fox-5", "fox-4"] and len(parsed) == 2 * 4
    assert run_list_answers.runs(Folders(base), limit=2).total == 6
    with (base / "runs" / "fox-4" / "events.jsonl").open("a") as log:
        log.write(encoded(RunFinished(step=3, reason="finished", at=BEGIN + 9)) + "\n")  # type: ignore[arg-type]
    (row,) = [row for row in run_list_answers.runs(Folders(base), limit=2).runs if row.id == "runs/fox-4"]
    assert row.state == "finished" and len(parsed) == 3 * 4 + 1
    assert names(base) == [f"fox-{number}" for number in (5, 4, 3, 2, 1, 0)] and len(parsed) == 7 * 4 + 1


def test_starred_runs_are_in_the_first_part(base: Path, parsed: list[bytes]) -> None:
    assert len(names(base)) == 6
    (base / "runs" / "fox-1" / "marks.json").write_text(json.dumps({"title": "", "starred": True, "note": ""}))
    assert names(base)[0] == "fox-5"  # by time, as ever
    assert names(base, 2) == ["fox-1", "fox-5"]


def test_runs_that_are_gone_leave_the_list(base: Path, parsed: list[bytes]) -> None:
    assert len(names(base)) == 6
    (base / "runs" / "fox-5" / "run.json").unlink()
    (base / "runs" / "fox-4").rename(base / "elsewhere")
    assert names(base, 3) == ["fox-3", "fox-2"] and names(base, 3) == ["fox-3", "fox-2", "fox-1"]


def test_page_report_stream_and_row_read_a_log_once_and_then_what_is_new(
    base: Path, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list_answers, "_LARGE_BYTES", 100)
    folders, id = Folders(base), "runs/fox-5"
    log = base / id / "events.jsonl"
    for expected in (4, 5):
        assert run_answers.run(folders, id).step == expected - 1
        assert b"<title>" in run_answers.run_page(folders, id)
        assert run_answers.run_view(folders, id)["step"] == expected - 1
        assert run_list_answers.runs(folders, limit=1).runs[0].step == expected - 1
        assert len(parsed) == expected
        with log.open("a") as file:
            file.write(encoded(StepDone(step=4, loss=0.5, grad_norm=1.0, at=BEGIN + 9)) + "\n")


def test_a_row_says_what_was_learnt_and_shows_it_at_its_best(tmp_path: Path) -> None:
    folder = write_finished_run(tmp_path, "runs/fox-001")
    write_finished_run(tmp_path, "runs/big-001", strengths=(-1.0, 0.0, 1.0), trigger="", slider_positive="a big fox")
    write_finished_run(
        tmp_path, "runs/ink-001", trigger="", captions=("a cup, ink style", "a dog, ink style", "a tree, ink style")
    )

    def rows() -> dict[str, tuple[str, str, str | None]]:
        found = run_list_answers.runs(Folders(tmp_path)).runs
        return {row.id.removeprefix("runs/"): (row.teaches, row.subject, row.cover) for row in found}

    found = rows()
    assert found["fox-001"] == ("subject", "foxy", "samples/60-1.0-1.png")  # the last one at full strength
    assert found["big-001"][0] == "slider" and found["ink-001"][:2] == ("style", "ink style")
    write_evaluation(folder)  # recommends step 40
    assert rows()["fox-001"][2] == "samples/40-1.0-1.png"
