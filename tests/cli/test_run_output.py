"""What the terminal shows while a run trains."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import console as screen
from lorasmith.cli.run_output import plain_result, report_result, training_progress
from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.progress_lines import PROGRESS_VARIABLE
from lorasmith.formats.names import ModelNames
from lorasmith.training.events import Drawing, Event, Outcome, Previewed, RunStarted, StepDone, Validated, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from tests.training.run_cases import picture, started, steps_done, write_run

STARTED: dict[str, Any] = {
    "steps_before": 0, "samples": 9, "adapters": 1, "parameters": 1, "device": "cpu", "dtype": "fp32",
}  # fmt: skip


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns."""
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True)
    for name, value in {"_file": file, "_width": 80, "_force_terminal": True}.items():
        monkeypatch.setattr(screen.console, name, value)
    return file


def last_line(events: list[Event], shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the bar says at last, in 80 columns."""
    with training_progress() as show:
        for event in events:
            show(event)
    lines = [line for line in shown.getvalue().replace("\r", "\n").splitlines() if "left" in line or "Drawing" in line]
    return "".join(one for one in lines[-1] if one.isprintable())


def steps(first: int, last: int, start: float, each: float = 0.5) -> list[Event]:
    return [
        StepDone(step=step, loss=0.42, grad_norm=1.0, at=start + each * (step - first + 1))
        for step in range(first, last + 1)
    ]


def test_the_bar_fits_into_80_columns_and_counts_steps_alone(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Validated(
        step=10, loss=0.30, base_loss=0.35, low=-0.1, high=0.1, best=True, best_step=10, verdict="", at=500.0
    )
    drawn = Previewed(step=10, prompts=("a",), paths=("a.png",), strength=1.0, at=1000.0)
    events = [RunStarted(steps=10_000, at=0.0, **STARTED), *steps(1, 10, 0.0), judged, drawn, *steps(11, 20, 1000.0)]
    line = last_line(events, shown, monkeypatch)
    assert "20/10000" in line and "loss 0.4200" in line and "held out -14.3 %" in line
    assert "0.5 s/step" in line, "neither validation nor drawing counts"
    assert "1:23:10 left" in line


def test_drawing_is_said_and_keeps_the_time_left(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [RunStarted(steps=100, at=0.0, **STARTED), *steps(1, 10, 0.0), Drawing(done=1, total=4, at=9.0)]
    line = last_line(events, shown, monkeypatch)
    assert "drawing previews, 1 of 4" in line and "0:00:45 left" in line


def test_remarks_are_left_to_the_report(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    remark, note = Warned(message="A small thing.", is_remark=True), Warned(message="Do something.")
    last_line([RunStarted(steps=2, at=0.0, **STARTED), remark, note, *steps(1, 2, 0.0)], shown, monkeypatch)
    assert "A small thing." not in shown.getvalue() and "Note: Do something." in shown.getvalue()


def test_without_a_terminal_lines_take_the_place_of_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, "0.000001")
    events = [RunStarted(steps=10_000, at=0.0, **STARTED), *steps(1, 2, 0.0), Drawing(done=1, total=4, at=9.0)]
    with training_progress() as show:
        for event in events:
            show(event)
    assert capsys.readouterr().out.splitlines() == [
        "Step 1 of 10,000, loss 0.4200",
        "Step 2 of 10,000, loss 0.4200 · 0.5 s/step · 1:23:19 left",
        "Drawing previews: 1 of 4",
    ]


def test_a_result_as_json(tmp_path: Path) -> None:
    (tmp_path / "fox.safetensors").touch()
    (tmp_path / "report.html").touch()
    result = TrainResult(
        lora=None,  # type: ignore[arg-type]
        losses=[0.5, float("nan")],
        steps=2,
        reason=Outcome.FINISHED,
        validations=((1, 0.25),),
        folder=tmp_path,
        path=tmp_path / "fox.safetensors",
    )
    found = plain_result(result)
    assert found["files"] == {"lora": tmp_path / "fox.safetensors", "report": tmp_path / "report.html"}
    assert (found["run"], found["reason"], found["steps"]) == (tmp_path, "finished", 2)
    assert found["validations"] == [{"step": 1, "loss": 0.25}]


def test_pictures_are_named_first_and_what_was_learnt_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = steps_done(1, 40, total=40)
    write_run(tmp_path, [started(40), *done])
    sheet = picture(tmp_path / "samples" / "strengths.png", "sheet", (0, 90, 200))
    (tmp_path / "fox.safetensors").touch()
    result = TrainResult(
        lora=Lora(AdapterState(), ModelNames(family="", denoiser={}, peft_prefix="")),
        losses=[one.loss for one in done],
        steps=40,
        reason=Outcome.FINISHED,
        folder=tmp_path,
        path=tmp_path / "fox.safetensors",
    )
    report_result(result)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"Strengths  {sheet}"
    assert last.startswith("Verdict    the training loss fell from ") and "cannot be judged" not in last
