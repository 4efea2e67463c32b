"""Training losses by noise level and image, on losses whose story is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import pytest

from lorasmith.training.storage.ledger import MIN_DRAWS, ImageLevels, Ledger

NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
STEPS = 300

Story = Callable[[float], float]


def told(stories: Sequence[Story], *, steps: int = STEPS, batch: int = 2, scatter: float = 0.2) -> Ledger:
    """Each image's loss follows a story over the run's time from 0 to 1, times a factor of the noise level."""
    rng = np.random.default_rng(0)
    ledger = Ledger(NAMES[: len(stories)])
    for step in range(1, steps + 1):
        draws = []
        for index in (np.arange(batch) + step * batch) % len(stories):
            quantile = float(rng.random())
            level = 0.05 + 2 * (1 - quantile) ** 6  # ranges over a factor of forty
            noise = float(rng.lognormal(0, scatter))
            draws.append((int(index), quantile, stories[index](step / steps) * level * noise))
        ledger.add(step, draws)
    return ledger


def steady(t: float) -> float:
    return 1.0


def falling(t: float) -> float:
    return 1.0 - 0.6 * t


def learnt_early(t: float) -> float:
    return 0.6 + 0.4 * math.exp(-t / 0.15)


def standings(records: Sequence[ImageLevels]) -> dict[str, str]:
    return {record.name[0]: record.standing for record in records}


def test_each_story_has_its_standing() -> None:
    records = told(
        [learnt_early, falling, lambda t: 0.6, lambda t: 3 * steady(t), lambda t: 0.12 + 0.88 * (t < 0.3)]
    ).images(held_out_fall=0.8)
    assert standings(records) == {
        "a": "learnt",
        "b": "still learning",
        "c": "unchanged",
        "d": "never fit",
        "e": "memorised",
    }
    assert [record.draws for record in records] == [120] * 5
    hard = records[3]
    assert hard.relative > 1.8
    assert hard.first == pytest.approx(hard.last, rel=0.15)


def test_noise_levels_are_taken_out() -> None:
    """An image that always meets the clean end, where losses are forty times as high, is not harder for it."""
    ledger = Ledger(["clean", "noisy", "both", "either"])
    rng = np.random.default_rng(1)
    for step in range(200):
        for index, quantile in enumerate((0.05, 0.95, *rng.choice([0.05, 0.95], 2))):
            level = 2.0 if quantile < 0.5 else 0.05
            ledger.add(4 * step + index, [(index, quantile, level * float(rng.lognormal(0, 0.1)))])
    assert [record.relative for record in ledger.images()] == pytest.approx([1, 1, 1, 1], rel=0.05)


def test_everybody_memorised_shows_against_held_out_images_alone() -> None:
    ledger = told([lambda t: 1.0 if t < 0.4 else 0.3] * 6)
    assert set(standings(ledger.images(held_out_fall=1.2)).values()) == {"memorised"}
    assert "memorised" not in standings(ledger.images()).values()
    assert "memorised" not in standings(ledger.images(held_out_fall=0.3)).values()


def test_an_easy_image_is_not_memorised_for_being_easy() -> None:
    ledger = told([lambda t: 0.3 * falling(t), *[falling] * 5])
    record = ledger.images()[0]
    assert record.relative < 0.5
    assert record.standing == "still learning"


def test_an_image_that_is_drawn_most_is_not_the_measure_of_the_others() -> None:
    """Half of all draws are of one image, which is learnt by heart: the others are as they would be without it."""
    rng = np.random.default_rng(3)
    ledger = Ledger(NAMES)
    for step in range(1, 601):
        index = 0 if step % 2 else 1 + step // 2 % 5
        level = 0.1 + 0.9 * math.exp(-step / 100) if index == 0 else falling(step / 600)
        quantile = float(rng.random())
        ledger.add(step, [(index, quantile, level * (0.05 + 2 * (1 - quantile) ** 6) * float(rng.lognormal(0, 0.2)))])
    records = ledger.images()
    assert [record.draws for record in records] == [300, *[60] * 5]
    assert standings(records) == {"a": "memorised"} | dict.fromkeys("bcdef", "still learning")
    assert records[0].relative == pytest.approx(0.22, rel=0.25)


def test_an_image_whose_losses_scatter_needs_more_to_be_judged() -> None:
    def standing(size: float, scatter: float) -> str:
        rng, ledger = np.random.default_rng(0), Ledger(NAMES)
        for step in range(1, 361):
            index = step % 6
            loss = float(rng.lognormal(0, 0.1 if index else scatter)) * (1.0 if index else size)
            ledger.add(step, [(index, float(rng.random()), loss)])
        return ledger.images()[0].standing

    assert [standing(3.5, scatter) for scatter in (0.8, 2.0)] == ["never fit", "unchanged"]
    assert standing(6.0, 2.0) == "never fit"


def test_few_images_are_not_compared() -> None:
    records = told([lambda t: 5 * steady(t), falling, falling]).images()
    assert "never fit" not in standings(records).values()
    assert all(math.isnan(record.relative) for record in records)


def test_few_looks_say_nothing() -> None:
    ledger = told([lambda t: 10.0, steady], steps=MIN_DRAWS - 1)
    assert [record.draws for record in ledger.images()] == [MIN_DRAWS - 1] * 2
    assert set(standings(ledger.images()).values()) == {"too few draws"}
    unseen = Ledger(["a.png"]).images()[0]
    assert (unseen.draws, unseen.standing) == (0, "too few draws")
    assert math.isnan(unseen.relative)


def test_the_curve_has_mean_losses_by_noise_level_and_stretch() -> None:
    ledger = Ledger(["a.png"])
    for step in range(1, 7):
        ledger.add(step, [(0, 0.25, float(step)), (0, 1.0, 10.0 * step)] if step < 5 else [(0, 0.0, 7.0)])
    curve = ledger.curve(points=3, bins=2)
    assert curve.bins == (0.0, 0.5, 1.0)
    assert curve.steps == (2, 4, 6)
    assert curve.losses == ((1.5, 15.0), (3.5, 35.0), (7.0, None))
    assert Ledger(["a.png"]).curve().losses == ()


def test_a_step_taken_again_replaces_what_came_after_it() -> None:
    ledger, straight = Ledger(["a.png"]), Ledger(["a.png"])
    for step in (1, 2, 3, 4, 2, 3):
        ledger.add(step, [(0, 0.5, float(step))])
    for step in (1, 2, 3):
        straight.add(step, [(0, 0.5, float(step))])
    assert [*map(astuple, ledger.images())] == [*map(astuple, straight.images())]  # a NaN of a tuple equals itself
    assert ledger.curve() == straight.curve()


def test_repeats_are_one_image_and_losses_that_are_not_finite_are_left_out() -> None:
    ledger = Ledger(["a.png", "b.png", "a.png"])
    ledger.add(1, [(0, 0.1, 1.0), (1, 0.1, 1.0), (2, 0.1, 1.0), (0, 0.5, math.nan), (1, 0.5, math.inf)])
    assert [(record.name, record.draws) for record in ledger.images()] == [("a.png", 2), ("b.png", 1)]
