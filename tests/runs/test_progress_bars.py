"""Bars are drawn where somebody looks, and notes are written in any case."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest

from lorasmith.core.progress_lines import PROGRESS_VARIABLE
from lorasmith.runs import progress_bars
from lorasmith.runs.progress_bars import counted, note, run_shown
from lorasmith.training.events import CaptionEncoded, Resumed, RunStarted, StepDone, Validated, Warned


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    shown = Terminal()
    monkeypatch.setattr(progress_bars, "sys", types.SimpleNamespace(stderr=shown, modules=sys.modules))
    monkeypatch.setenv("COLUMNS", "100")
    return shown


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error that is a file."""
    shown = io.StringIO()
    monkeypatch.setattr(progress_bars, "sys", types.SimpleNamespace(stderr=shown, modules=sys.modules))
    return shown


def started(steps: int) -> RunStarted:
    return RunStarted(steps=steps, steps_before=0, samples=1, adapters=1, parameters=1, device="cpu", dtype="fp32")


def validated(loss: float) -> Validated:
    return Validated(step=1, loss=loss, base_loss=1.0, low=0, high=0, best=True, best_step=1, verdict="better")


def test_what_is_counted_is_a_bar(terminal: Terminal) -> None:
    with counted("Encoding", True) as show:
        assert show is not None
        show(1, 4, "1.png")
        show(4, 4, "4.png")
    assert "Encoding: 100%" in terminal.getvalue() and "4/4" in terminal.getvalue()


def test_no_bar_where_nobody_looks_or_none_is_wanted(log: io.StringIO) -> None:
    """But a line now and then, of what takes long."""
    for wanted in (False, None):
        with counted("Encoding", wanted) as show:
            assert show is None
    with counted("Encoding", True) as show:
        assert show is not None
        show(2, 2)
    assert log.getvalue() == ""


def test_a_line_now_and_then_where_nobody_looks(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, "0.000001")
    with counted("Encoding", True) as show:
        assert show is not None
        show(2, 2)
    with run_shown(True) as handle:
        handle(started(4))
        handle(StepDone(step=1, loss=0.5, grad_norm=1.0))
    assert log.getvalue().splitlines() == ["Encoding: 2 of 2", "Step 1 of 4, loss 0.5000"]


def test_a_function_is_called_instead(terminal: Terminal) -> None:
    calls: list[Any] = []
    with counted("Encoding", lambda *counts: calls.append(counts)) as show:
        assert show is not None
        show(1, 2, "1.png")
    assert calls == [(1, 2, "1.png")]
    assert terminal.getvalue() == ""


def test_a_run_shows_steps_the_mean_loss_and_what_validations_say(terminal: Terminal) -> None:
    with run_shown(True) as show:
        show(started(10))
        show(CaptionEncoded(done=1, total=3))
        show(Resumed(step=4, message="it continues"))
        show(Warned(message="mind \x1b[31mthe step"))
        show(validated(0.9))
        for step in (5, 6):
            show(StepDone(step=step, loss=step / 10, grad_norm=1.0))
    shown = terminal.getvalue()
    assert "it continues" in shown and "\x1b[31m" not in shown and "mind" in shown
    assert "6/10" in shown and "loss 0.5500 · held out -10.0 %" in shown


def test_a_long_run_averages_its_last_losses(terminal: Terminal) -> None:
    with run_shown(True) as show:
        show(started(60))
        for step in range(1, 61):
            show(StepDone(step=step, loss=100.0 if step <= 40 else 1.0, grad_norm=1.0))
    assert "loss 1.000" in terminal.getvalue()


def test_a_log_has_the_notes_alone(log: io.StringIO) -> None:
    with run_shown(True) as show:
        show(started(2))
        show(Warned(message="a note"))
        show(validated(0.9))
        show(StepDone(step=1, loss=1.0, grad_norm=1.0))
    assert log.getvalue() == "a note\n"


def test_nothing_is_shown_where_that_is_wanted(terminal: Terminal) -> None:
    with run_shown(False) as show:
        show(started(2))
        show(Warned(message="a note"))
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("config, expected", [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_is_an_audience_and_a_shell_is_not(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: bool
) -> None:
    shell = types.SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress_bars._has_audience() is expected


def test_notes_are_printable(log: io.StringIO) -> None:
    note("a\x07b")
    assert "\x07" not in log.getvalue()
