"""How much is drawn that nobody asked for: as much as fits into a tenth of the run, counted before its first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs.presets import PRESETS, Preset, recipe_settings
from lorasmith.runs.preview_budget import (
    PreviewProgram,
    evaluation_effort,
    loras_evaluated,
    program_within,
    unasked_program,
)
from lorasmith.runs.run import run
from lorasmith.runs.run_previews import previews_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Previewed, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.train import Plan
from lorasmith.training.watchers import preview_steps
from tests.hosts import Audience

WHOLE = PreviewProgram(20, (0.5, 1.0), (30, 100, 250, 500, 750))


@pytest.mark.parametrize(
    ("budget", "pictures", "sampling_steps", "steps"),
    [
        (352, 8, 20, [30, 100, 250, 500, 750]),  # 44 passes for a picture of 20 steps
        (351, 7, 20, [30, 100, 250, 500, 750]),
        (307, 4, 20, [30, 500]),
        (175, 4, 12, [30, 500]),
        (111, 4, 8, [30, 500]),
        (79, 3, 8, [30]),
        (59, 2, 12, []),
        (55, 2, 8, []),
    ],
)
def test_what_fits_into_a_number_of_passes(budget: float, pictures: int, sampling_steps: int, steps: list[int]) -> None:
    program = program_within(budget, WHOLE, each_step=2)
    assert program is not None
    assert (program.pictures, program.sampling_steps, list(program.steps)) == (pictures, sampling_steps, steps)
    assert program.passes(2) <= budget


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"steps": 2000}, [30, 100, 500, 1000, 1500]),
        ({"steps": 150}, [7, 37, 75, 112]),
        ({"steps": 3}, [1, 2]),
        ({"steps": 1}, []),
        ({"steps": 100, "preview_every": 30}, [30, 60, 90]),
    ],
)
def test_the_first_preview_is_early_in_a_run(settings: dict[str, int], steps: list[int]) -> None:
    assert list(preview_steps(TrainConfig(**settings))) == steps


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("images", [1, 20, 100])
def test_the_presets_draw_along_the_way(tiny: Model, preset: Preset, images: int) -> None:
    """A sampling step is twice a pass of the denoiser, as of most models."""
    config = TrainConfig(**recipe_settings(preset, images=images))
    side = tiny.defaults.resolution // tiny.components.latent.downscale
    program = unasked_program(config, tiny, samples(side), "a fox")
    assert program is not None and program.steps[0] <= config.steps / 20


def test_a_slider_keeps_its_strengths_as_long_as_they_fit() -> None:
    slider = replace(WHOLE, strengths=(-2.0, -1.0, 1.0, 2.0), is_strip=True)

    def within(budget: float) -> tuple[int, int, list[int]]:
        found = program_within(budget, slider, each_step=2)
        assert found is not None
        return len(found.strengths), found.sampling_steps, list(found.steps)

    assert within(176) == (4, 12, [30])
    assert within(100) == (4, 8, [])
    assert within(99) == (0, 8, [30, 500])


@pytest.mark.parametrize(
    ("training_s", "sampling_step_s", "noises", "sampling_steps", "wishes", "pictures", "seconds"),
    [
        (50, 0.01, 3, 20, 8, 170, 34),
        (50, 0.03, 1, 20, 8, 80, 48),  # the minute that is always there
        (50, 0.05, 1, 12, 8, 80, 48),
        (50, 0.07, 1, 8, 8, 80, 44.8),
        (300, 0.07, 1, 20, 8, 80, 112),  # half of the training
        (7200, 0.08, 3, 20, 8, 170, 272),
        (7200, 0.1, 1, 20, 8, 80, 160),  # never more than five minutes
        (50, 0.1, 1, 8, 4, 60, 48),
        (50, 1.0, 1, 8, 4, 40, 320),  # where none fits, the shortest
        (50, None, 1, 8, 4, 40, None),
    ],
)
def test_an_evaluation_afterwards_has_a_budget_of_time(
    tiny: Model,
    training_s: float,
    sampling_step_s: float | None,
    noises: int,
    sampling_steps: int,
    wishes: int,
    pictures: int,
    seconds: float | None,
) -> None:
    found = evaluation_effort(tiny, "sks fox", 4, training_s=training_s, sampling_step_s=sampling_step_s)
    drawing = found.drawing
    assert (drawing.noises, drawing.steps, len(drawing.prompts)) == (noises, sampling_steps, wishes)
    assert found.pictures == pictures and found.seconds == pytest.approx(seconds)
    assert evaluation_effort(tiny, "sks fox", 1, training_s=50, sampling_step_s=1.0).pictures == 30


def test_where_nothing_fits_nothing_is_drawn() -> None:
    assert program_within(39, WHOLE, each_step=2) is None
    assert program_within(39, WHOLE, each_step=1) == PreviewProgram(8, (), (30,))
    assert program_within(35, WHOLE, each_step=1) == PreviewProgram(12, ())


def test_fewer_sampling_steps_than_asked_for_stay_fewer() -> None:
    assert program_within(24, PreviewProgram(4, (), [9]), each_step=2) == PreviewProgram(4, ())


def samples(side: int) -> list[Sample]:
    return [Sample(torch.zeros(4, side, side), Conditioning({}), "a.png")]


def planned(tiny: Model, steps: int, trigger: str | None = "sks dog") -> Plan:
    side = tiny.defaults.resolution // tiny.components.latent.downscale
    config = TrainConfig(steps=steps, rank=2, targets="attention", previews="a lion", preview_strengths="")
    job = plan_job(tiny.denoiser, config, "cpu")
    return Plan(
        denoiser=tiny.denoiser, job=job, data=EncodedDataset(tuple(samples(side))), title="pets", trigger=trigger
    )


def test_what_previews_leave_evaluates_loras(
    previews_measured: None, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = PreviewProgram(8, (), prompts=("a lion",))
    counts = [loras_evaluated(planned(tiny, steps), program) for steps in (100, 10_000, 20_000, 100_000)]
    assert counts[0] == 0 and 0 < counts[1] < counts[2] <= counts[3] == 10
    left = 0.1 * 20_000 * 2 - program.passes(2)
    assert (32 * (counts[2] + 1) + 10) * (8 * 2 + 4) <= left < (32 * (counts[2] + 2) + 10) * (8 * 2 + 4)
    assert loras_evaluated(planned(tiny, 100_000, None), program) == 0, "there is no trigger to draw"
    monkeypatch.setattr("lorasmith.evaluation.likeness._PACKAGES", ("not_there",))
    assert loras_evaluated(planned(tiny, 100_000), program) == 0


def test_an_evaluation_that_fails_is_a_warning(
    previews_measured: None, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds no run, so that there is nothing to evaluate."""
    program = PreviewProgram(1, (), prompts=("a lion",))
    draw = previews_of(planned(tiny, 100_000), program, tmp_path, Audience())
    monkeypatch.setattr(draw, "_previews", lambda *_: iter(()))
    assert not [*draw(10, tmp_path / "pets.safetensors", final=False)]
    (event,) = draw(20, tmp_path / "pets.safetensors", final=True)
    assert isinstance(event, Warned) and event.message.startswith("the LoRAs could not be evaluated (")


def test_the_sizes_of_latents_count_on_both_sides(tiny: Model) -> None:
    """Latents of half the side cost a quarter, so four times the steps have the same program, later in the run."""
    side = tiny.defaults.resolution // tiny.components.latent.downscale

    def facts(config: TrainConfig, side: int) -> tuple[int, int] | None:
        program = unasked_program(config, tiny, samples(side), "a fox")
        return None if program is None else (program.pictures, program.sampling_steps)

    for steps in (100, 240, 400, 3200):
        config = TrainConfig(steps=steps)
        quarter = facts(replace(config, steps=4 * steps), side // 2)
        assert facts(config, side) == quarter
        assert facts(replace(config, steps=steps // 4, batch_size=4), side) == quarter


def test_the_program_of_a_run_is_at_most_a_tenth_of_its_passes(tiny: Model) -> None:
    side = tiny.defaults.resolution // tiny.components.latent.downscale
    found = {}
    for steps in range(3, 2000, 7):
        program = unasked_program(TrainConfig(steps=steps), tiny, samples(side), "a fox")
        found[steps] = 0 if program is None else program.passes(2)
        assert found[steps] <= 0.1 * 2 * steps
    assert found[3] == 0 and list(found.values()) == sorted(found.values())
    with pytest.raises(OptionError, match="preview_strengths"):
        unasked_program(TrainConfig(preview_strengths="much"), tiny, samples(side), "a fox")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(("settings", "drawn"), [({}, 0), ({"previews": "a lion", "preview_steps": 1}, 3)])
def test_a_short_run_draws_what_was_asked_for_alone(
    tiny: Model, captions: list[Conditioning], tmp_path: Path, settings: dict[str, Any], drawn: int
) -> None:
    """Three steps are worth less than a picture."""
    audience = Audience()
    data = EncodedDataset((Sample(torch.randn(4, 8, 8), captions[0], "1.png"),))
    config = TrainConfig(steps=3, rank=2, targets="*.attn2.to_q", training_dtype="fp32", preview_every=3, **settings)
    job = plan_job(tiny.denoiser, config, "cpu")
    run(Plan(denoiser=tiny.denoiser, job=job, data=data, prompt="a fox", output=tmp_path / "run"), audience)
    assert sum(isinstance(event, Previewed) for event in audience.events) == drawn
    told = [event.message for event in audience.events if isinstance(event, Warned) and "previews" in event.message]
    assert told == (
        []
        if drawn
        else [
            "No previews are drawn, as two pictures would take more than preview_share of this run; prompts in "
            "previews are drawn in any case."
        ]
    )


def test_a_run_on_pairs_draws_several_of_them(tiny: Model) -> None:
    """A control as large as the picture doubles the cost of a preview and of a step."""
    side = tiny.defaults.resolution // tiny.components.latent.downscale
    control = torch.zeros(1, 4, side, side)
    pairs = [
        Sample(torch.zeros(4, side, side), Conditioning({}, f"edit {n}").with_controls([control]), f"{n % 6}.png")
        for n in range(8)
    ]
    plain = unasked_program(TrainConfig(steps=8000), tiny, samples(side), "a fox")
    several = unasked_program(TrainConfig(steps=8000), tiny, pairs, "a fox")
    assert plain is not None and several is not None
    assert plain.prompts == ("a fox",) and len(several.prompts) == 4
    assert several.prompts == ("edit 6", "edit 7", "edit 2", "edit 3"), "as they are drawn"
    for steps in range(3, 2000, 41):
        program = unasked_program(TrainConfig(steps=steps), tiny, pairs, "a fox")
        passes = 0 if program is None else program.passes(2) * len(program.prompts)
        assert passes <= 0.1 * 2 * steps
