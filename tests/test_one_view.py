"""A new metric of a step is a field of `StepDone` and an entry of `METRICS`; every door then shows it."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import console as screen
from lorasmith.cli.run_output import training_progress
from lorasmith.core.extras import EDITOR
from lorasmith.core.progress_lines import PROGRESS_VARIABLE
from lorasmith.nodes.training import _NodeHost
from lorasmith.runs import progress_bars, view
from lorasmith.runs.progress_bars import run_shown
from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_page import report_of
from lorasmith.runs.view import METRICS, Metric, RunView
from lorasmith.training.events import Event, StepDone
from lorasmith.training.storage.trackers import Tracker
from tests.launched import needs_editor
from tests.training.run_cases import started, write_run

PACKAGE = Path(screen.__file__).parents[1]
LINE = "sharpness 0.25"


@dataclass(frozen=True, kw_only=True)
class MeasuredStep(StepDone):
    sharpness: float


STEPS: tuple[Event, ...] = (started(2), MeasuredStep(step=1, loss=0.5, grad_norm=1.0, sharpness=0.25, at=1.8e9))


@pytest.fixture(autouse=True)
def metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharpness(shown: RunView) -> Metric | None:
        if not isinstance(shown.last, MeasuredStep):
            return None
        return Metric("sharpness", "sharpness of the minimum", shown.last.sharpness, "0.25", "", LINE)

    monkeypatch.setattr(view, "METRICS", (*METRICS, sharpness))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 120 columns, for rich and for tqdm."""
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True)
    for name, value in {"_file": file, "_width": 120, "_force_terminal": True}.items():
        monkeypatch.setattr(screen.console, name, value)
    monkeypatch.setattr(progress_bars, "sys", types.SimpleNamespace(stderr=file, modules=sys.modules))
    monkeypatch.setenv("COLUMNS", "120")
    return file


@pytest.mark.parametrize("door", [training_progress, lambda: run_shown(True)], ids=["terminal", "notebook"])
def test_a_bar_shows_it(terminal: io.StringIO, door: Callable[[], Any]) -> None:
    with door() as show:
        for event in STEPS:
            show(event)
    assert LINE in terminal.getvalue()


def test_lines_without_a_terminal_have_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, "0.000001")
    with training_progress() as show:
        for event in STEPS:
            show(event)
    assert LINE in capsys.readouterr().out


@needs_editor
def test_a_node_shows_it_and_page_and_editor_receive_it() -> None:
    texts: list[str] = []
    views: list[dict[str, Any]] = []
    context = types.SimpleNamespace(
        publish=lambda kind, data: views.append(data),
        progress=lambda step, steps, text: texts.append(text),
        log=lambda text: None,
        folders=types.SimpleNamespace(output=Path()),
    )
    host = _NodeHost(context, 2)  # type: ignore[arg-type]
    for event in STEPS:
        host.on_event(event)
    assert LINE in texts[-1]
    assert {"name": "sharpness", "label": "sharpness of the minimum", "value": 0.25, "text": "0.25", "unit": "",
            "line": LINE} in views[-1]["metrics"]  # fmt: skip
    for script in (PACKAGE / "server/pages/parts/engineers.mjs", EDITOR.folder / "extensions/lorasmith/lorasmith.js"):
        assert "view.metrics.map(" in script.read_text(encoding="utf-8"), "each one is drawn"


def test_the_report_has_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, []))
    for event in STEPS:
        run.log.take(event)
    assert report_of(run).facts["sharpness of the minimum"] == "0.25"


def test_a_tracker_logs_it() -> None:
    logged: list[dict[str, float]] = []
    tracker = Tracker(types.SimpleNamespace(log=lambda values, step: logged.append(values)), "It", lambda event: None)
    for event in STEPS:
        tracker(event)
    assert logged == [{"train/loss": 0.5, "train/grad_norm": 1.0, "train/learning_rate": 0.0, "train/sharpness": 0.25}]
