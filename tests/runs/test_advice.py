"""Advice on single images of a run, from losses whose story is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorasmith.report.run_report import Advice
from lorasmith.runs.advice import advice_of
from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_page import report_of
from lorasmith.training.events import Event, StepDone
from tests.training.run_cases import started, validated, write_run

NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png")


def losses(story: str = "", *, steps: int = 360, seed: int = 0) -> list[Event]:
    """Steps of one image each, whose loss falls to a half; of a `story`, images of some names do otherwise."""
    rng = np.random.default_rng(seed)
    order = [0] * (9 if "often" in story else 1) + [1, 2, 3, 4, 5]
    events: list[Event] = [started(steps, samples=len(NAMES))]
    for step in range(1, steps + 1):
        image, time = order[step % len(order)], step / steps
        level = 1 - time / 2
        if image == 0 and "often" in story:
            level = 0.1 + 0.9 * math.exp(-6 * time)
        if image == 5 and "odd" in story:
            level = 3 - time / 2
        if "all" in story:
            level = 0.2 + 0.8 * math.exp(-6 * time)
        quantile = float(rng.random())
        loss = level * (0.05 + 2 * (1 - quantile) ** 6) * float(rng.lognormal(0, 0.2))
        events.append(StepDone(step=step, loss=loss, grad_norm=1.0, draws=((image, quantile, loss),), at=float(step)))
    return events


def told(folder: Path, events: list[Event], *, record: dict[str, Any] | None = None, **settings: Any) -> Advice:
    write_run(folder, events, captions=["a fox"] * len(NAMES), **settings)
    path = folder / "run.json"
    written = json.loads(path.read_text("utf-8"))
    written["samples"] = [{"name": name, "caption": "a fox", "latents": [4, 8, 8]} for name in NAMES]
    path.write_text(json.dumps(written | (record or {})), "utf-8")
    return advice_of(read_run(folder))


def on_folder(**settings: Any) -> dict[str, Any]:
    return {
        "source": {
            "command": "train",
            "folder": "photos",
            "name": "fox",
            "output": None,
            "model": "lorasmith-tiny",
            **settings,
        }
    }


def test_an_image_that_is_drawn_often_and_one_that_does_not_belong(tmp_path: Path) -> None:
    advice = told(tmp_path / "run", losses("often, odd", steps=700), record=on_folder())
    assert [(one.name, one.finding) for one in advice.images] == [
        ("f.png", "never learnt"),
        ("a.png", "learnt by heart"),
    ]
    odd, often = advice.images
    assert "times that of the others at the same noise levels" in odd.reason and odd.drawn_less == ""
    assert "and it was drawn 9 times as often" in often.reason
    assert often.drawn_less == "a.png=0.11"
    assert advice.summary == (
        "f.png is never learnt: look at its caption, or leave it out if it does not belong here. a.png is learnt by "
        "heart: draw it less often, or leave it out."
    )
    assert report_of(read_run(tmp_path / "run")).advice == advice


def test_a_rule_of_the_run_is_gone_on_from(tmp_path: Path) -> None:
    events = losses("often", steps=700)
    advice = told(tmp_path / "run", events, record=on_folder(image_repeats="[ab].png=0.5"))
    assert advice.images[0].drawn_less == "a.png=0.05"
    assert told(tmp_path / "graph", events, record={"source": {"command": "run"}}).images[0].drawn_less == ""


@pytest.mark.parametrize("seed", range(5))
def test_equal_images_have_none(tmp_path: Path, seed: int) -> None:
    assert told(tmp_path / "run", losses(seed=seed)) == Advice(summary="None of 6 images stands out by its losses.")


def test_few_looks_give_none_and_say_so(tmp_path: Path) -> None:
    advice = told(tmp_path / "run", losses("odd", steps=40))
    assert advice == Advice(
        summary="Advice on single images needs at least 4 images that were drawn 12 times each, got 0 of 6, and the "
        "one drawn most was drawn 7 times."
    )
    assert told(tmp_path / "none", losses(steps=0)) == Advice()


def test_where_all_are_learnt_by_heart_the_run_is_too_long(tmp_path: Path) -> None:
    judged = [validated(step, total=360, best_step=0) for step in range(0, 361, 36)]
    advice = told(tmp_path / "run", [*losses("all"), *judged])
    assert advice == Advice(summary="6 of 6 images are learnt by heart: train for fewer steps.")


def test_pictures_of_the_class_are_no_measure(tmp_path: Path) -> None:
    """Their losses are lower from the start, as the model made them."""
    events = losses("odd")
    facts = {"data": {"images": [{"name": name, "use": "class"} for name in NAMES[:2]]}}
    with_class: list[Event] = []
    for one in events:
        if isinstance(one, StepDone):
            draws = tuple((image, quantile, loss / 20 if image < 2 else loss) for image, quantile, loss in one.draws)
            one = StepDone(step=one.step, loss=1.0, grad_norm=1.0, draws=draws)
        with_class.append(one)
    advice = told(tmp_path / "run", with_class, record=facts)
    assert [one.name for one in advice.images] == ["f.png"]


@pytest.mark.parametrize(
    "method", [{"pairs": "dpo"}, {"slider_positive": "a big dog", "slider_negative": "a small dog"}]
)
def test_methods_without_a_loss_of_single_pictures_have_none(tmp_path: Path, method: dict[str, Any]) -> None:
    assert told(tmp_path / "run", losses("odd"), **method) == Advice()
