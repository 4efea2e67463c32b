"""The benchmark of what LoRAs learn: its measures, its recipes, its page, and bounds on our own figures."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import measuring
from benchmarks.quality.__main__ import main
from benchmarks.quality.measuring import Checkpoint, Job, Outcome, Setting, Store
from benchmarks.quality.page import sheet, write_page
from benchmarks.quality.protocol import at, final, freeze, tuning
from benchmarks.quality.recipes import PEERS, RECIPES
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
from benchmarks.quality.tables import (
    candidate_table,
    difference_table,
    measures_table,
    reach_table,
    summary_table,
    tuning_table,
)
from benchmarks.quality.validation import area
from benchmarks.results import Results
from lorasmith.core.files import locked
from lorasmith.evaluation.wishes import STYLES
from lorasmith.families.model import Model
from lorasmith.sampling.generate import generate
from lorasmith.training.config import config_over
from tools.pretrain.data import CONCEPTS


def test_area_under_the_curve_of_same_and_different_subjects() -> None:
    found = torch.eye(4)[[0, 0, 1, 1]]
    assert area(found, ["a", "a", "b", "b"], ["x", "y", "x", "y"]) == 1
    assert area(found, ["a", "b", "a", "b"], ["x", "y", "z", "w"]) < 0.5
    assert area(torch.ones(4, 1), ["a", "a", "b", "b"], ["x", "y", "z", "w"]) == 0.5


def test_recipes_are_settings_that_no_default_of_ours_decides() -> None:
    for name, recipe in RECIPES.items():
        config = config_over(None, recipe.at(10.0))
        assert config.learning_rate == pytest.approx(10 * recipe.rates["learning_rate"])
        if name in PEERS:
            assert {*_DECIDED} <= {*recipe.at(10.0)}, name
    assert RECIPES["sd-scripts"].at(1.0, is_transformer=True)["targets"] == "transformer"


_DECIDED = "optimizer", "schedule", "weight_decay", "max_grad_norm", "rank", "targets", "stratified"


def test_tasks_hold_out_what_they_do_not_train_on() -> None:
    assert [*BUILT_IN] == [*DEVELOPMENT, *DEVELOPMENT_STYLES, *TEST, *TEST_STYLES]
    for task in BUILT_IN.values():
        trained = {one.tobytes() for one in task.training[12]}
        assert len(trained) == 12
        assert {one.tobytes() for one in task.training[4]} <= trained
        assert trained.isdisjoint(one.tobytes() for one in task.held_out)


def test_captions_say_what_else_a_drawing_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "load_dataset", lambda pairs, *_, **__: [text for _, text in pairs])
    task, model = BUILT_IN["fox"], cast("Model", None)
    assert [*measuring.encoded(model, task, 4)] == ["sks dog"] * 4
    assert [*measuring.encoded(model, task, 4, is_captioned=True)] == [
        "sks dog, noto style, on a white background",
        "sks dog, twemoji style, on a pink background",
        "sks dog, flat style, on a grey background",
        "sks dog, soft shaded style, on a white background",
    ]
    assert [*measuring.encoded(model, BUILT_IN[STYLE], 1, is_captioned=True)] == ["sks style"]
    setting, job, store = Setting((20, 40)), Job("lorasmith", "fox", 4, 0, 10.0), Store(tmp_path)
    assert store.file(setting, job) != store.file(setting, replace(job, is_captioned=True))


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


LOOKS = (20, 40, 80, 160, 320)


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on record answers none of the runs that these tests make."""
    monkeypatch.setattr(measuring, "RECORD", tmp_path / "outcomes.jsonl")


def outcome(
    recipe: str,
    task: str,
    scores: Sequence[float],
    *,
    factor: float = 10.0,
    evaluations: Sequence[float] = (),
    seconds: float = 0.25,
    seed: int = 0,
    strip: Path = Path(),
    **changes: object,
) -> Outcome:
    """Of a run with these scores at the first looks."""
    bleed = None if task == STYLE else 0.75
    checkpoints = tuple(
        Checkpoint(look, look * seconds, 2 * score, 0.5, 0.5, 0.2, 0.1, 0.1, bleed, evaluation or None)
        for look, score, evaluation in itertools.zip_longest(LOOKS[: len(scores)], scores, evaluations)
    )
    job = Job(recipe, task, 4, seed, factor, changes, length=checkpoints[-1].looks)
    return Outcome("lorasmith-tiny", job, checkpoints, strip)


def test_outcomes_are_kept_by_what_makes_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, store = Setting(LOOKS), Store(tmp_path)
    job = Job("comfyui", "fox", 4, 0, 10.0, {"ema_decay": 0.9}, length=40)
    made = outcome("comfyui", "fox", [0.2, 0.3]).checkpoints
    asked: list[Job] = []

    class Bench:
        def run(self, job: Job) -> object:
            asked.append(job)
            return made, [[Image.new("RGB", (8, 8), colour)] * 4 for colour in ("red", "blue")]

    monkeypatch.setattr(measuring, "_prepare", lambda setting: None)
    monkeypatch.setattr(measuring, "_bench", Bench(), raising=False)
    for _ in range(2):
        measuring._work(store, [(setting, job)], math.inf)
    measuring._work(store, [(setting, replace(job, seed=1))], 0.0)  # too late
    assert asked == [job]
    found = store.known(setting, job)
    assert found is not None and (found.job, found.checkpoints) == (job, made)
    with Image.open(found.strip) as strip:
        assert (strip.size, strip.getpixel((0, 127))) == ((256, 128), (0, 0, 255))
    # A shorter series of looks, and the same settings under another name, are the same run; others are not.
    assert store.known(replace(setting, looks=(20, 40)), replace(job, length=0)) is not None
    others = {"seed": 1}, {"pictures": 1}, {"task": "owl"}, {"factor": 5.0}, {"length": 80}, {"is_evaluated": True}
    assert not any(store.known(setting, replace(job, **one)) for one in ({"changes": {}}, *others))
    other = replace(job, seed=1)
    with locked(store.file(setting, other).with_suffix(".claim"), "another process makes it"):
        measuring._work(store, [(setting, other)], math.inf)
    assert asked == [job]
    measuring._work(store, [(setting, other)], math.inf)
    assert asked == [job, other]
    # What was recorded is known without its folder, and not made again.
    store.record()
    elsewhere = Store(tmp_path / "elsewhere")
    measuring._work(elsewhere, [(setting, job)], math.inf)
    recorded = elsewhere.known(setting, job)
    assert recorded is not None and recorded.checkpoints == made and asked == [job, other]


def test_a_recipe_is_tuned_for_each_length_and_runs_at_one_rate_are_one_run(tmp_path: Path) -> None:
    setting, file = Setting(LOOKS), tmp_path / "frozen.json"
    jobs = tuning(setting, ["lorasmith", "comfyui"], ["fox", "owl"], [4], [0])
    assert [len([one for one in jobs if one.recipe == name]) for name in ("lorasmith", "comfyui")] == [30, 10]
    assert [one.task for one in jobs] == ["fox"] * 20 + ["owl"] * 20
    runs = [
        outcome("comfyui", task, scores, factor=factor)
        for task, factor, scores in (
            ("fox", 5.0, [0.1, 0.2, 0.3, 0.5]),
            ("fox", 10.0, [0.1, 0.3, 0.4, 0.4]),
            ("owl", 5.0, [0.1, 0.4, 0.4, 0.4]),  # not of the other rate: it says nothing
        )
    ]
    runs += [outcome("lorasmith", "fox", scores, factor=3.0 + len(scores)) for scores in ([0.1, 0.2], [0.1, 0.9, 0.3])]
    freeze(runs, (40, 80, 160), file)
    frozen = json.loads(file.read_text())
    assert frozen["lorasmith-tiny"] == {
        "comfyui": {"4": {"40": 10.0, "80": 10.0, "160": 5.0}},
        "lorasmith": {"4": {"40": 5.0, "80": 6.0}},
    }
    freeze([outcome("comfyui", STYLE, [0.1, 0.2, 0.3, 0.5], factor=7.0)], (40, 80, 160), file)
    of_style = json.loads(file.read_text())["lorasmith-tiny"]["comfyui"]
    assert of_style == {**frozen["lorasmith-tiny"]["comfyui"], "4 of a style": {"40": 7.0, "80": 7.0, "160": 7.0}}
    final_jobs = final(setting, ["comfyui"], ["fox"], [4, 12], [0], frozen)
    assert [(one.pictures, one.length, one.factor) for one in final_jobs] == [
        (4, 80, 10.0),
        (4, 320, 5.0),
        (12, 80, 10.0),
        (12, 320, 5.0),
    ]
    with pytest.raises(SystemExit, match="tune it first"):
        final(setting, ["diffusers"], ["fox"], [4], [0], frozen)


def test_the_evaluation_picks_the_checkpoint_and_a_length_has_its_own_run() -> None:
    short = outcome("lorasmith", "fox", [0.1, 0.2], evaluations=[0.1, 0.2])
    long = outcome("lorasmith", "fox", [0.3, 0.4, 0.5, 0.4], evaluations=[0.1, 0.3, 0.6, 0.5])
    found = {look: [round(one.score, 3) for one in at([long, short], look)] for look in LOOKS[:-1]}
    assert found == {20: [0.1, 0.1], 40: [0.2, 0.2], 80: [0.5, 0.5], 160: [0.5, 0.4]}
    unknown = outcome("comfyui", "fox", [0.5, 0.4])
    assert [round(one.score, 3) for one in at([unknown], 40)] == [0.4, 0.4]


def test_tables_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strip, page = tmp_path / "strip.png", tmp_path / "quality.md"
    Image.new("RGB", (256, 64 * len(LOOKS))).save(strip)
    page.write_text("a\n<!-- test -->\nold\n<!-- end of test -->\nc\n", "utf-8")
    subjects = TEST[:8]
    runs = [outcome("lorasmith", one, [0.1, 0.2, 0.4, 0.45], seconds=0.5, strip=strip) for one in subjects]
    runs += [outcome("comfyui", one, [0.1, 0.2, 0.2, 0.4, 0.3], strip=strip) for one in subjects]
    runs += [outcome("diffusers", one, [0.1, 0.1, 0.1, 0.1, 0.2], strip=strip) for one in subjects]
    results = Results(argparse.Namespace(json=None))
    summary_table(runs, LOOKS, results)
    reach_table(runs, LOOKS, results)
    difference_table(runs, LOOKS, results)
    measures_table(runs, 160, results)
    write_page(page, "test", results.markdown())
    text = page.read_text("utf-8")
    part = "| lorasmith-tiny | subjects | 4 |"
    # What ComfyUI's has after 160 pictures and 40 s ours has after 80 pictures and 40 s.
    share = "0.50 (0.50 to 0.50)", "1.00 (1.00 to 1.00)"
    assert f"{part} lorasmith | 8 | 0.100 | 0.200 | 0.400 | 0.450 |  | 80 | {share[0]} | 80 | 40 | {share[1]} |" in text
    assert f"{part} comfyui | 0.400 | 40 | 80 | {share[0]} | 40 | {share[1]} |" in text
    assert f"{part} comfyui (best peer) | 8 | 0.100 | 0.200 | 0.200 | 0.400 | 0.300 | 160 |" in text
    never = "> 320 | > 2.00 (> 2.00 to > 2.00) | > 320 | > 80 |"
    assert f"{part} diffusers | 8 | 0.100 | 0.100 | 0.100 | 0.100 | 0.200 | {never}" in text
    p = 2 / 2**8
    less = f"{part} lorasmith | comfyui"
    ahead = f"+0.050 | +0.050 to +0.050 | {p:.3f} | {6 * p:.3f} | ahead |"
    assert f"{less} | both 160 pictures | 8 | {ahead}" in text
    equal = "+0.000 | +0.000 to +0.000 | 1.000 | 1.000 | equivalent |"
    assert f"{less} | as many seconds as its 160 | 8 | {equal}" in text
    assert f"{part} lorasmith | 8 | 0.900 | 0.500 | 0.500 | 0.200 | 0.100 | 0.100 | 0.750 |" in text
    assert text.startswith("a\n<!-- test -->") and text.endswith("<!-- end of test -->\nc\n") and "old" not in text
    assert sheet(runs, LOOKS).height > 8 * 64

    capsys.readouterr()
    changed = [outcome("lorasmith", one, [0.1, 0.2, 0.3, 0.45], seconds=1, ema_decay=0.9) for one in subjects]
    candidate_table(runs[:8] + changed, LOOKS[:-1], results)
    row = f"ema_decay=0.9 | lorasmith | 80 | 8 | -0.100 | -0.100 to -0.100 | {p:.3f} | {4 * p:.3f} | behind | 2.00 |"
    assert row in capsys.readouterr().out
    tuning_table([*runs[:8], outcome("lorasmith", "fox", [0.5, 0.5], factor=20.0)], (40, 80, 160), results)
    said = capsys.readouterr().out
    assert f"{part} lorasmith | 10 | 8 |  |  | 0.450 |" in said
    assert f"{part} lorasmith | 20 | 1 | 0.500 |  |  |" in said


def test_seeds_that_are_needed_are_shown_where_two_were_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        outcome(recipe, task, [0.1, 0.2, 0.3, 0.3 + (recipe == "lorasmith") * noise], seed=seed)
        for recipe in ("lorasmith", "comfyui")
        for task, noises in (("fox", (0.05, -0.05)), ("owl", (-0.05, 0.05)))
        for seed, noise in enumerate(noises)
    ]
    difference_table(runs, LOOKS, Results(argparse.Namespace(json=None)))
    # Variance of seeds 0.005, none of subjects: 0.005 / (28 × (0.03 / 2.80)²) = 1.55.
    assert "| equivalent | 2 |" in capsys.readouterr().out


def test_the_phases_make_runs_and_write_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(store: Store, runs: Sequence[tuple[Setting, Job]], workers: int, until: float) -> None:
        for setting, job in runs:
            height = 0.5 - 0.01 * abs(job.factor - 5) - 0.1 * (job.recipe == "comfyui") - 0.1 * len(job.changes)
            scores = [height * look / 320 for look in job.looks(setting)]
            found = outcome(job.recipe, job.task, scores, evaluations=scores if job.is_evaluated else ()).checkpoints
            store.keep(setting, job, found, [[Image.new("RGB", (8, 8))] * 4] * len(found))

    monkeypatch.setattr(Store, "make", make)
    (tmp_path / "images").mkdir()
    for page in ("quality", "quality-methods"):
        parts = (f"<!-- {part} -->\n<!-- end of {part} -->\n" for part in ("tune", "test", "try"))
        (tmp_path / f"{page}.md").write_text("".join(parts), "utf-8")

    def run(phase: str, *more: str) -> str:
        fixed = "--folder", tmp_path / "runs", "--frozen", tmp_path / "frozen.json", "--docs", tmp_path
        fixed += "--recipes", "lorasmith", "comfyui", "--pictures", "4", *more
        monkeypatch.setattr(sys, "argv", ["quality", phase, *map(str, fixed)])
        main()
        return capsys.readouterr().out

    # The shares of two machines, of which the first leaves runs of each recipe to the other.
    assert "10 of 20 runs are there, 0 are in the tables" in run("tune", "--tasks", "fox", "--share", "1/2")
    assert "20 of 20 runs are there, 20 are in the tables" in run("tune", "--tasks", "fox", "--share", "2/2")
    rates = json.loads((tmp_path / "frozen.json").read_text())["lorasmith-tiny"]
    assert rates == {one: {"4": {"40": 5.0, "80": 5.0, "160": 5.0}} for one in ("lorasmith", "comfyui")}
    assert "20 of 40 runs are there, 20" in run("tune", "--tasks", "fox", "owl", "--only-known")
    said = run("test", "--tasks", *TEST[:3])
    assert "12 of 12 runs are there" in said and "| lorasmith | comfyui | both 160 pictures | 3 | +0.050 |" in said
    assert "| lorasmith-tiny | subjects | 4 | comfyui | 0.200 | 40 | 121 |" in (tmp_path / "quality.md").read_text()
    assert "ours has it" not in (tmp_path / "quality-methods.md").read_text()
    assert (tmp_path / "images" / "quality.webp").is_file()
    assert "| ema_decay=0.9 | lorasmith | 160 | 2 | -0.050 |" in run(
        "try", "--tasks", "fox", "owl", "--change", "ema_decay=0.9"
    )


@pytest.mark.slow
def test_our_own_figures(tmp_path: Path) -> None:
    """What is drawn at once equals what is drawn one by one; and ours learns what it should of two subjects."""
    setting, store = Setting((40, 80)), Store(tmp_path)
    jobs = [Job("lorasmith", one, 4, 0, 10.0, is_evaluated=True) for one in ("fox", "owl")]
    store.make([(setting, one) for one in jobs], 2, math.inf)
    found = [store.known(setting, one) for one in jobs]
    last = [one.checkpoints[-1] for one in found if one is not None]
    assert len(last) == 2
    assert statistics.mean(one.score for one in last) > 0.55
    assert statistics.mean(one.drift for one in last) < 0.2
    measuring._prepare(setting)
    asked = [("sks dog", 1), ("a dog, on a blue background", 2)]
    model = measuring._bench.model
    texts, seeds = zip(*asked, strict=True)
    one_by_one = generate(
        model.denoiser, texts, text_encoder=model.text_encoder, seed=seeds, steps=4, dtype=torch.float32
    )
    for together, alone in zip(measuring._bench._drawn(asked, None), one_by_one, strict=True):
        assert np.abs(np.asarray(together, np.int16) - np.asarray(alone, np.int16)).max() <= 1
