"""How much is drawn that nobody asked for: as much as fits into a tenth of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.app.preview_budget import BudgetedPreviews, PreviewProgram, program_within
from lorasmith.sampling.previews import PictureCost
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.events import Event, RunStarted, StepDone, Warned

WHOLE = PreviewProgram(20, (0.5, 1.0), is_final_only=False)
COST = PictureCost(step_s=0.5, other_s=2.0)  # 12 s for a picture of 20 steps
LORA = Path("dog.safetensors")


@pytest.mark.parametrize(
    ("budget", "pictures", "steps", "is_final_only"),
    [
        (72, 6, 20, False),
        (71, 3, 20, True),
        (35, 2, 20, True),
        (23, 2, 12, True),
        (15, 2, 8, True),
        (0, 2, 8, True),
    ],
)
def test_what_fits_into_the_time(budget: float, pictures: int, steps: int, is_final_only: bool) -> None:
    program = program_within(budget, COST, WHOLE)
    assert (program.pictures, program.sampling_steps, program.is_final_only) == (pictures, steps, is_final_only)


def test_fewer_sampling_steps_than_asked_for_stay_fewer() -> None:
    assert program_within(0, COST, PreviewProgram(4, (), is_final_only=False)).sampling_steps == 4


def started(at: float = 0.0) -> RunStarted:
    return RunStarted(steps=100, steps_before=0, samples=1, adapters=1, parameters=1, device="cpu", dtype="fp32", at=at)


def previews(run_steps: int, step_s: float, **measured: Any) -> tuple[BudgetedPreviews, list[Any]]:
    drawn: list[Any] = []

    def make(program: PreviewProgram) -> Any:
        def draw(step: int, lora: Path, *, final: bool = False) -> list[Event]:
            drawn.append((step, final, program))
            return []

        return draw

    made = BudgetedPreviews(WHOLE, make, measured.get("measure", lambda: COST), run_steps=run_steps)
    made.hear(started())
    for step in range(1, 26):  # the tenth waits for a validation
        made.hear(StepDone(step=step, loss=0.1, grad_norm=1.0, at=step_s * step + 100.0 * (step > 10)))
    return made, drawn


def test_a_long_run_is_drawn_over_its_steps() -> None:
    draw, drawn = previews(run_steps=1000, step_s=1.0)
    draw(25, LORA)
    draw(100, LORA, final=True)
    assert [(step, final, one.pictures) for step, final, one in drawn] == [(25, False, 6), (100, True, 6)]
    assert not draw.is_final_only


def test_a_short_run_draws_the_finished_lora_beside_the_base_model() -> None:
    draw, drawn = previews(run_steps=50, step_s=1.0)
    assert not draw.is_final_only, "nothing is known before the first preview"
    draw(25, LORA)
    assert drawn == [] and draw.is_final_only
    draw(50, LORA, final=True)
    ((step, final, program),) = drawn
    assert (step, final, program.pictures, program.sampling_steps) == (50, True, 2, 8)


def test_a_measurement_that_is_cancelled_is_repeated_and_one_that_fails_is_a_warning() -> None:
    def cancel() -> PictureCost:
        raise SamplingCancelledError("stopped")

    draw, drawn = previews(100, 1.0, measure=cancel)
    assert draw(25, LORA) == [] and draw.program is None

    def fail() -> PictureCost:
        raise RuntimeError("no memory")

    draw, drawn = previews(100, 1.0, measure=fail)
    (warned,) = draw(25, LORA)
    assert isinstance(warned, Warned) and "no preview can be drawn (RuntimeError: no memory)" in warned.message
    assert draw(100, LORA, final=True) == [] == drawn
