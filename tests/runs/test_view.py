from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lorasmith.report.loss_plot import recent_loss
from lorasmith.runs.run_plan import ImageEncoded
from lorasmith.runs.view import Note, RunView, ViewPublisher, note_of
from lorasmith.training.events import (
    CaptionEncoded,
    Drawing,
    EarlierEvents,
    Event,
    Outcome,
    Previewed,
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


def judged(number: int) -> Validated:
    return Validated(
        step=number,
        loss=0.9,
        base_loss=1.0,
        low=-0.2,
        high=0.0,
        best=True,
        best_step=number,
        verdict="still improving",
        at=number,
    )


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


def test_steps_of_several_attempts_count_once_and_time_is_that_of_training_alone() -> None:
    back = RolledBack(step=5, to_step=2, images=(), rate_factor=0.5, message="It diverged.", at=4)
    first = [started(), *map(step, (1, 2, 3, 4)), back]
    again = [started(at=5000), step(3, 0.1, at=5003), step(4, 0.1, at=5004), started(at=9000), step(4, 0.2, at=9005)]
    view = after(*first, *again)
    assert [(one.step, one.loss) for one in view.points] == [(1, 1.0), (2, 1.0), (3, 0.1), (4, 0.2)]
    assert (view.seconds, view.faults) == (13, [5])
    assert after().seconds == 0 and after(started(at=1000), step(1, at=900)).seconds == 0, "a clock jumped"


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_a_clock_that_is_set_and_a_computer_that_sleeps_change_neither_speed_nor_time(jump: float) -> None:
    before = [started(), *(step(number, at=2 * number) for number in range(1, 6))]
    later = [step(number, at=2 * number + jump) for number in range(6, 9)]
    view = after(*before, later[0])
    assert (view.seconds_per_step, view.seconds_left) == (2, 8), "at once"
    view = after(*before, *later)
    assert (view.seconds_per_step, view.seconds_left) == (2, 4)
    assert view.seconds == pytest.approx(16, abs=2), "the step of the jump may be missing"
    view = after(*before, StateSaved(step=5, path="", at=10 - abs(jump)), *later)
    assert view.seconds_per_step == 2, "back while it saves"


def test_a_run_that_is_resumed_has_what_its_log_has() -> None:
    log = [started(), *map(step, (1, 2, 3)), judged(3), started(at=50)]
    resumed = Resumed(step=3, message="It continues.", at=51)
    view = after(ImageEncoded(done=4, total=4, cached=0), started(at=50), EarlierEvents(events=tuple(log)), resumed)
    whole = RunView.of([*log, resumed])
    view.take(step(4, at=60))
    whole.take(step(4, at=60))
    assert (view.points, view.validations, view.seconds) == (whole.points, whole.validations, whole.seconds)
    assert view.to_json()["preparation"] == ["Photos prepared: 4 of 4"]


def test_the_time_of_a_picture_is_that_of_previews() -> None:
    drawn = {"prompts": ("a",) * 2, "paths": ("a.png",) * 2}
    view = after(started(at=10), Previewed(step=1, strength=0.0, at=20, **drawn))
    assert view.sampling_step_s is None  # a log of an earlier version
    for strength, at in ((0.5, 24.0), (1.0, 28.0), (2.0, 90.0)):  # while the last was drawn, other programs were busy
        view.take(Previewed(step=1, strength=strength, at=at, sampling_steps=20, **drawn))
    assert view.sampling_step_s == pytest.approx(0.1)


def test_a_view_as_json_is_small_and_finite_however_long_the_run() -> None:
    prompts = ("a fox",) * 4
    view = after(started(100_000), Warned(message="Beware."))
    for number in range(1, 20_001):
        view.take(step(number, math.inf if number == 1 else 1 / number))
        if number % 100 == 0:
            view.take(judged(number))
    view.take(Previewed(step=20_000, prompts=prompts, paths=("/moved/samples/1.png",) * 4, strength=1.0))
    shown = view.to_json()
    assert len(json.dumps(shown, allow_nan=False)) < 60_000
    first, *_, last = shown["curve"]
    assert first == [1, None, None] and last == [20_000, 5e-05, pytest.approx(view.loss.mean, rel=1e-5)]
    assert len(shown["curve"]) <= 501
    assert shown["previews"][0]["file"] == "samples/1.png"
    assert [one["text"] for one in shown["notes"]] == ["Beware."]


def test_progress_is_published_once_a_second_and_everything_else_at_once() -> None:
    published: list[dict[str, Any]] = []
    publisher = ViewPublisher(published.append)
    steps = [step(number, at=number / 10) for number in range(1, 31)]
    for event in (started(), *steps[:15], Warned(message="Beware.", at=1.55), *steps[15:]):
        publisher(event)
    assert [(one["step"], len(one["notes"])) for one in published] == [(0, 0), (1, 0), (11, 0), (15, 1), (21, 1)]


def test_what_is_done_instead_of_a_step() -> None:
    assert after(CaptionEncoded(done=2, total=4)).activity == ("encoding captions", 2, 4)
    assert after(Drawing(done=1, total=3)).activity == ("drawing previews", 1, 3)
    assert (
        after(Drawing(done=3, total=3)).activity is None and after(Drawing(done=1, total=3), step(1)).activity is None
    )


def test_validations_and_the_end() -> None:
    view = after(started(), step(4), judged(4), RunFinished(step=4, reason=Outcome.STOPPED))
    assert "held out -10.0 %" in view.line and view.outcome is Outcome.STOPPED and view.best == judged(4)
    assert after(started()).best is None and after(started()).line == ""


def test_notes_are_for_whoever_watches_and_remarks_for_the_report() -> None:
    assert note_of(Warned(message="Beware.")) == Note("Note", "Beware.", is_warning=True)
    assert note_of(Warned(message="So it is.", is_remark=True)) == Note("Remark", "So it is.")
    assert note_of(Resumed(step=2, message="It continues.")) == Note("Resumed", "It continues.", 2)
    assert note_of(step(1)) is None
