"""`lorasmith report` from the outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.run_cases import whole_run

Command = Callable[..., Any]


def test_the_page_is_made_again(lorasmith: Command, tmp_path: Path) -> None:
    run = whole_run(tmp_path / "runs" / "fox-001", total=40)
    for _ in range(2):
        ran = lorasmith("report", run)
        assert ran.code == 0 and str(run / "report.html") in ran.out, ran.err
    assert "Best at 20, overfitting since" in (run / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in run.iterdir()} == {
        "events.jsonl", "fox-best.safetensors", "fox.safetensors", "report.html", "run.json", "samples",
    }  # fmt: skip


def test_what_is_no_run_is_said(lorasmith: Command, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for folder in ("photos", "nowhere"):
        ran = lorasmith("report", folder)
        assert ran.code == 1 and f"a run folder must contain run.json, got {folder}" in ran.err
        assert "Report" not in ran.out
