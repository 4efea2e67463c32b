"""The benchmark of what LoRAs learn: its measures, its recipes, its page, and bounds on our own figures."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.quality import measuring
from benchmarks.quality.measuring import Checkpoint, Job, Outcome, Setting, outcomes_of
from benchmarks.quality.page import write_page
from benchmarks.quality.recipes import AVERAGE, METHODS, RECIPES, ROUTING, STRENGTH
from benchmarks.quality.scores import hypervolume, interval
from benchmarks.quality.subjects import (
    BUILT_IN,
    CLASSES,
    DEVELOPMENT,
    DEVELOPMENT_STYLES,
    STYLE,
    TEST,
    TEST_STYLES,
    drawing,
    folder_tasks,
)
from benchmarks.quality.tables import methods_table, recipe_tables
from benchmarks.quality.validation import area
from benchmarks.results import Results
from lorasmith.evaluation.wishes import STYLES
from lorasmith.training.config import config_over
from tools.pretrain.data import CONCEPTS

_SHARES = st.floats(0, 1)
SEVEN = DEVELOPMENT[:7]


@given(st.lists(st.tuples(_SHARES, _SHARES), max_size=6))
def test_hypervolume_is_the_share_of_a_grid_that_is_dominated(points: list[tuple[float, float]]) -> None:
    grid = [((one + 0.5) / 40, (other + 0.5) / 40) for one in range(40) for other in range(40)]
    below = statistics.mean(any(x <= a and y <= b for a, b in points) for x, y in grid)
    assert hypervolume(points) == pytest.approx(below, abs=0.1)


def test_an_interval_holds_the_mean_and_is_wide_where_subjects_differ() -> None:
    assert interval({"fox": [0.5, 0.5], "owl": [0.5]}) == (0.5, 0.5, 0.5)
    mean, low, high = interval({"fox": [0.1, 0.2], "owl": [0.8, 0.9], "bell": [0.5, 0.4]})
    assert mean == pytest.approx(0.4833, abs=1e-4)
    assert low < mean < high
    assert high - low > 0.3
    same, *of_seeds = interval({"fox": [0.1, 0.2], "owl": [0.8, 0.9], "bell": [0.5, 0.4]}, of_subjects=False)
    assert same == mean
    assert of_seeds == pytest.approx([mean - 1 / 30, mean + 1 / 30])  # two of three at their ends


def test_area_under_the_curve_of_same_and_different_subjects() -> None:
    found = torch.eye(4)[[0, 0, 1, 1]]
    assert area(found, ["a", "a", "b", "b"], ["x", "y", "x", "y"]) == 1
    assert area(found, ["a", "b", "a", "b"], ["x", "y", "z", "w"]) < 0.5
    assert area(torch.ones(4, 1), ["a", "a", "b", "b"], ["x", "y", "z", "w"]) == 0.5


def test_recipes_and_methods_are_settings() -> None:
    for settings in [one.at(10.0) for one in RECIPES.values()] + [*METHODS, *ROUTING]:
        given = {name: value for name, value in settings.items() if name not in (AVERAGE, STRENGTH)}
        assert config_over(None, {"preserve_class": "dog", **given}).preserve_class == "dog"


def test_tasks_hold_out_what_they_do_not_train_on() -> None:
    assert [*BUILT_IN] == [*DEVELOPMENT, *DEVELOPMENT_STYLES, *TEST, *TEST_STYLES]
    for task in BUILT_IN.values():
        trained = {one.tobytes() for one in task.training[12]}
        assert len(trained) == 12
        assert {one.tobytes() for one in task.training[4]} <= trained
        assert trained.isdisjoint(one.tobytes() for one in task.held_out)


def test_development_and_test_are_apart_and_the_model_was_trained_on_neither() -> None:
    assert len(TEST) >= 24 and not {*DEVELOPMENT} & {*TEST}
    assert not {*DEVELOPMENT, *TEST} & {*CONCEPTS}
    assert {*CLASSES} == {*DEVELOPMENT, *TEST}
    assert {*CLASSES.values()} < {*CONCEPTS}
    assert not {*TEST_STYLES.values()} & {*STYLES, *DEVELOPMENT_STYLES.values()}


_LISTS = """subject_name,class
{names}
prompt_list = [
'a {{0}} {{1}} on the beach'.format(unique_token, class_token),
'a red {{0}} {{1}}'.format(unique_token, class_token)
]
prompt_list = [
'a {{0}} {{1}} in a chef outfit'.format(unique_token, class_token)
]
"""


def photos(folder: Path) -> Path:
    """A folder like DreamBooth's, of drawings."""
    for subject in ("fox", "rocket"):
        (folder / subject).mkdir(parents=True)
        for icon_set in ("noto", "fluent-emoji-flat", "twemoji"):
            drawing(subject, icon_set, "white").save(folder / subject / f"{icon_set}.png")
    (folder / "prompts_and_classes.txt").write_text(_LISTS.format(names="fox,dog\nrocket,rocket ship"), "utf-8")
    return folder


def test_a_folder_like_dreambooths(tmp_path: Path) -> None:
    tasks = folder_tasks(photos(tmp_path))
    assert [one.text for one in tasks["fox"].prompts] == ["a sks dog in a chef outfit"]
    assert [one.text for one in tasks["rocket"].prompts] == ["a sks rocket ship on the beach", "a red sks rocket ship"]
    assert [len(tasks["fox"].training[4]), len(tasks["fox"].held_out)] == [2, 1]
    (tmp_path / "prompts_and_classes.txt").unlink()
    with pytest.raises(SystemExit, match="must list subjects"):
        folder_tasks(tmp_path)


def outcome(recipe: str, task: str, fidelity: float, **changes: object) -> Outcome:
    bleed = None if task == STYLE else 0.75
    checkpoints = tuple(
        Checkpoint(looks, looks / 4, fidelity * share, 0.5, 1 - share / 2, 0.2, 0.1, 0.1, bleed)
        for looks, share in ((40, 0.5), (80, 1.0))
    )
    picture = Image.new("RGB", (8, 8))
    strengths = (0.0, 0.2, 0.5, fidelity, 1.0, 1.0)
    return Outcome(Job(recipe, task, 4, 0, 10.0, changes), checkpoints, strengths, (picture,) * 11)


def test_an_outcome_that_is_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = outcome("lorasmith", "fox", 0.9, ema_decay=0.9)

    class Bench:
        setting = Setting((40, 80), folder=tmp_path)
        jobs: ClassVar[list[Job]] = []

        def run(self, job: Job) -> Outcome:
            self.jobs.append(job)
            return made

    monkeypatch.setattr(measuring, "_bench", Bench(), raising=False)
    first, again = measuring._run(made.job), measuring._run(made.job)
    assert first is made
    assert (again.job, again.checkpoints, again.strengths) == (made.job, made.checkpoints, made.strengths)
    assert [one.tobytes() for one in again.pictures] == [one.tobytes() for one in made.pictures]
    measuring._run(replace(made.job, seed=1))
    assert Bench.jobs == [made.job, replace(made.job, seed=1)]


def test_tables_and_page(tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    (tmp_path / "images").mkdir()
    marks = "<!-- recipes -->", "old", "<!-- end of recipes -->", "<!-- methods -->", "<!-- end of methods -->"
    page.write_text("\n".join(["a", *marks, "c\n"]), "utf-8")
    nothing = argparse.Namespace(json=None)
    results = Results(nothing)
    results.table({"run": ""}, "Checkpoints")
    runs = [outcome("lorasmith", one, 0.9) for one in SEVEN] + [outcome("comfyui", one, 0.6) for one in SEVEN]
    recipe_tables([*runs, outcome("lorasmith", STYLE, 0.9), outcome("comfyui", STYLE, 0.9)], results)
    write_page(page, results, runs, "recipes")
    # Corners at (fidelity, adherence) = (0.45, 0.75) and (0.9, 0.5).
    expected = 0.9 * 0.5 + 0.45 * 0.25
    assert f"| lorasmith | 10 | 4 | 7 | {expected:.3f} | {expected:.3f} to {expected:.3f} |" in page.read_text("utf-8")
    less = expected - (0.6 * 0.5 + 0.3 * 0.25)
    row = (
        "| lorasmith | 10 | 4 | 80 | 0.900 | 0.500 | 0.500 | 0.200 | 0.100 | 0.100 | 0.750 |"  # bleed of subjects alone
    )
    assert row in page.read_text("utf-8")
    assert f"| {less:+.3f} | {less:+.3f} to {less:+.3f} |" in page.read_text("utf-8")
    assert (tmp_path / "images" / "quality.webp").is_file()
    results = Results(nothing)
    results.table({"run": ""}, "Checkpoints")
    methods_table(runs[:7] + [outcome("lorasmith", one, 0.8, ema_decay=0.9) for one in SEVEN], results)
    write_page(page, results, runs, "methods")
    text = page.read_text("utf-8")
    gain = 0.8 * 0.5 + 0.4 * 0.25 - expected
    assert f"| ema_decay=0.9 | 7 | {expected + gain:.3f} | {gain:+.3f} | {gain:+.3f} to {gain:+.3f} | 1.00 |" in text
    assert "old" not in text
    assert text.startswith("a\n<!-- recipes -->")
    assert text.endswith("<!-- end of methods -->\nc\n")


@pytest.mark.slow
def test_our_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All subjects, with the first seed."""
    jobs = [Job(recipe, one, 4, 0, 10.0) for recipe in [*RECIPES][:3] for one in SEVEN]
    found = list(outcomes_of(jobs, Setting((40, 80, 160)), 2))
    volumes = [hypervolume([(one.fidelity, one.adherence or 0) for one in run.checkpoints]) for run in found]
    ours, comfyui, diffusers = (statistics.mean(volumes[start : start + 7]) for start in (0, 7, 14))
    assert ours > 0.75
    assert ours > comfyui
    assert ours > diffusers
    last = [run.checkpoints[-1] for run in found[:7]]
    assert statistics.mean(one.fidelity for one in last) > 0.7
    assert statistics.mean(one.drift for one in last) < 0.2
