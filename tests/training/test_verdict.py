"""What curves of known shape are called."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorasmith.core.errors import OptionError
from lorasmith.training.validation import History, interval

Array = NDArray[np.float64]
SEEDS = st.integers(0, 10_000)
IMAGES = st.integers(1, 12)


def table(mean: float, images: int, draws: int = 8, seed: int = 0) -> list[list[float]]:
    """Losses around a mean: images differ, noise levels differ much, and both stay as they are."""
    rng = np.random.default_rng(seed)
    shape = rng.uniform(0.8, 1.2, size=(images, 1)) * np.geomspace(0.3, 3.0, draws)
    return (mean * shape / shape.mean()).tolist()


def history(curve: Array, *, base: float = 1.0, images: int = 6, seed: int = 0, spread: float = 0.002) -> History:
    """Validations every ten steps along a curve, every pair with a little noise of its own."""
    rng = np.random.default_rng(seed)
    validations = []
    for index, mean in enumerate(curve):
        values = np.array(table(float(mean), images, seed=seed))
        noise = rng.normal(size=values.shape) * spread
        validations.append((10 * (index + 1), (values + noise - noise.mean()).tolist()))
    return History.of(table(base, images, seed=seed), validations)


@given(
    falls=st.lists(st.floats(0.01, 0.02), min_size=1, max_size=25),
    images=IMAGES,
    seed=SEEDS,
)
def test_a_falling_curve_is_still_learning(falls: list[float], images: int, seed: int) -> None:
    told = history(0.9 - np.cumsum(falls), images=images, seed=seed)
    assert told.verdict.startswith("still learning")
    assert told.since_best == 0
    assert told.best_step == 10 * len(falls)


@given(best=st.integers(2, 12), after=st.integers(8, 20), noise=st.floats(0.0, 0.008), images=IMAGES, seed=SEEDS)
def test_a_valley_is_overfitting_since_its_bottom(best: int, after: int, noise: float, images: int, seed: int) -> None:
    x = np.arange(best + after)
    curve = 0.6 + 0.25 * np.where(x <= best, (best - x) / best, (x - best) / 12)
    curve += noise * np.random.default_rng(seed).normal(size=len(x))
    told = history(curve, images=images, seed=seed)
    found = re.fullmatch(r"best at step (\d+), overfitting since( \(on \d held-out images? alone\))?", told.verdict)
    assert found, told.verdict
    assert int(found[1]) == told.best_step == 10 * (int(curve.argmin()) + 1)
    assert abs(told.best_step - 10 * (best + 1)) <= 20


@given(length=st.integers(8, 40), noise=st.floats(0.0, 0.01), images=IMAGES, seed=SEEDS)
def test_a_curve_that_falls_and_stays_has_levelled_off(length: int, noise: float, images: int, seed: int) -> None:
    x = np.arange(length + 12)
    curve = 0.5 + 0.4 * np.exp(-x / 1.5) + noise * np.random.default_rng(seed).normal(size=len(x))
    told = history(curve, images=images, seed=seed)
    found = re.match(r"levelled off at about step (\d+)", told.verdict)
    assert found, told.verdict
    assert int(found[1]) <= 120


def test_noise_around_a_constant_is_seldom_taken_for_overfitting() -> None:
    """Without a fall to compare with, chance alone decides, and it is kept rare."""
    rng = np.random.default_rng(0)
    verdicts = [history(0.8 + 0.05 * rng.normal(size=30), seed=seed).verdict for seed in range(100)]
    assert sum("overfitting" in verdict for verdict in verdicts) <= 5


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        (lambda x: 1.0 + 0.05 * x, "worse than the base model; try a lower learning rate"),
        (lambda x: 1.0 + 0.01 * (-1.0) ** x, "no better than the base model so far"),
        (lambda x: 1.5 - 0.02 * x, "still learning, but no better than the base model so far"),
    ],
)
def test_a_run_that_is_no_better_than_the_base_model_is_called_so(
    curve: Callable[[Array], Array], verdict: str
) -> None:
    assert history(curve(np.arange(12.0)), spread=0.02).verdict == verdict


def test_few_images_are_said_to_be_few() -> None:
    curve = 0.9 - 0.05 * np.arange(6)
    assert history(curve, images=1).verdict == "still learning (on 1 held-out image alone)"
    assert history(curve, images=4).verdict == "still learning (on 4 held-out images alone)"
    assert history(curve, images=5).verdict == "still learning"


def test_a_judgement_says_where_the_run_stands() -> None:
    told = History([[2.0, 4.0]] * 5)
    first = told.add(10, [[1.0 + 0.1 * i, 3.0 + 0.1 * i] for i in range(5)])
    assert (first.step, first.loss, first.base_loss) == (10, pytest.approx(2.2), 3.0)
    assert first.low < -0.8 < first.high < 0
    assert first.best
    second = told.add(20, [[1.5, 3.5]] * 5)
    assert (second.best, second.best_step, second.low, second.high) == (False, 10, -0.5, -0.5)


def test_pairs_show_what_the_spread_of_images_would_hide() -> None:
    """Losses of images differ tenfold; that each is a little lower than before is certain all the same."""
    base = [[size * (1 + 0.1 * draw) for draw in range(8)] for size in (0.1, 0.2, 0.5, 1.0, 1.1, 1.2)]
    told = History(base)
    judged = told.add(1, [[loss - 0.01 for loss in row] for row in base])
    assert judged.high < -0.009


@given(
    losses=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    patience=st.integers(0, 5),
)
def test_patience_counts_validations_without_an_improvement(losses: list[int], patience: int) -> None:
    told = History([[9.0, 9.0]])
    waited, best = 0, 99
    for index, loss in enumerate(losses):
        judged = told.add(index + 1, [[float(loss), float(loss)]])
        waited, best = (0, loss) if loss < best else (waited + 1, best)
        assert judged.best == (waited == 0)
        assert told.since_best == waited
        assert told.should_stop(patience) == (0 < patience <= waited)


def test_nothing_stops_before_the_first_validation_and_one_number_is_none() -> None:
    told = History([[9.0, 9.0]])
    assert not told.should_stop(1)
    assert told.verdict.startswith("too early to say")
    with pytest.raises(OptionError, match="two images or two noise levels"):
        History([[1.0]])


def test_its_losses_are_its_state() -> None:
    for images in (2, 7):
        told = history(0.5 + 0.01 * (np.arange(12) - 5) ** 2, images=images)
        again = History.of(
            told.base_table.tolist(), zip(told.steps, [one.tolist() for one in told.tables], strict=True)
        )
        one, other = (replace(each.add(500, table(0.7, images)), at=0.0) for each in (again, told))
        assert one == other
        assert again.steps == told.steps


def test_a_step_taken_again_replaces_what_came_after_it() -> None:
    told = history(np.array([0.9, 0.8, 0.7, 0.6]))
    told.add(30, table(0.85, 6))
    assert told.best_step == 20
    assert told.since_best == 1


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (11, 2.228), (12, 2.201), (21, 2.086), (101, 1.984)])
def test_the_interval_is_students(n: int, t: float) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(t * values.std(ddof=1) / n**0.5, rel=2e-3)
    assert (high + low) / 2 == pytest.approx(values.mean())
