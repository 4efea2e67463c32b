from __future__ import annotations

import math

import pytest

from lorasmith.report.loss_plot import recent_loss
from lorasmith.runs.view import RunView, note_of
from lorasmith.training.events import (
    CaptionEncoded,
    Drawing,
    Event,
    Outcome,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    StateSaved,
    StepDone,
    Validated,
    Warned,
)


def started(steps: int = 10, at: float = 0.0) -> RunStarted:
    return RunStarted(
        steps=steps, steps_before=0, samples=4, adapters=1, parameters=9, device="cpu", dtype="fp32", at=at
    )


def step(number: int, loss: float = 1.0, at: float | None = None) -> StepDone:
    return StepDone(step=number, loss=loss, grad_norm=0.0, at=float(number if at is None else at))


def after(*events: Event) -> RunView:
    view = RunView()
    for event in events:
        view.take(event)
    return view


def test_the_loss_is_that_of_reports_and_speed_leaves_out_what_lies_between_steps() -> None:
    losses = [1 / number for number in range(1, 8)]
    events = [step(number, loss) for number, loss in enumerate(losses, 1)]
    view = after(started(), *events, StateSaved(step=7, path="", at=107.0), step(8, math.nan, at=108.0))
    assert view.loss == recent_loss(losses) and (view.step, view.steps) == (8, 10)
    assert view.seconds_per_step == pytest.approx(1.0) and view.seconds_left == pytest.approx(2.0)
    assert after(started(), step(1)).seconds_left is None, "the first step compiles and plans"


def test_steps_that_are_taken_back_do_not_count() -> None:
    back = RolledBack(step=4, to_step=2, images=(), rate_factor=0.5, message="Step 4 diverged.")
    view = after(started(), *(step(number, float(number)) for number in (1, 2, 3)), back)
    assert (view.step, view.loss) == (2, recent_loss([1.0, 2.0]))
    assert after(started(), Resumed(step=5, message="It continues."), step(6)).step == 6


def test_what_is_done_instead_of_a_step() -> None:
    assert after(CaptionEncoded(done=2, total=4)).activity == ("encoding captions", 2, 4)
    assert after(Drawing(done=1, total=3)).activity == ("drawing previews", 1, 3)
    assert (
        after(Drawing(done=3, total=3)).activity is None and after(Drawing(done=1, total=3), step(1)).activity is None
    )


def test_validations_and_the_end() -> None:
    judged = Validated(
        step=4, loss=0.9, base_loss=1.0, low=-0.2, high=0.0, best=True, best_step=4, verdict="still improving"
    )
    view = after(started(), step(4), judged, RunFinished(step=4, reason=Outcome.STOPPED))
    assert view.held_out_change == pytest.approx(-0.1) and view.outcome is Outcome.STOPPED
    assert after(started()).held_out_change is None


def test_notes_are_for_whoever_watches_and_remarks_for_the_report() -> None:
    assert note_of(Warned(message="Beware.")) == ("Note", "Beware.")
    assert note_of(Warned(message="So it is.", is_remark=True)) is None
    assert note_of(Resumed(step=2, message="It continues.")) == ("Resumed", "It continues.")
    assert note_of(step(1)) is None
