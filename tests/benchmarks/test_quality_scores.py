"""The statistics of the benchmark of what LoRAs learn, on numbers whose results are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality.scores import (
    MARGIN,
    bootstrap,
    compared,
    holm,
    reach,
    seeds_needed,
    sign_flip_p,
    value_at,
    variance_components,
)


def test_a_level_is_reached_between_checkpoints_on_a_logarithmic_axis() -> None:
    looks, curve = [20, 40, 80, 160], np.array([0.2, 0.4, 0.3, 0.6])
    assert reach(looks, curve, 0.2) == 20
    assert reach(looks, curve, 0.3) == pytest.approx(20 * math.sqrt(2))
    assert reach(looks, curve, 0.5) == pytest.approx(80 * math.sqrt(2))  # from the 0.4 that it had before it fell
    assert reach(looks, curve, 0.61) == math.inf
    assert value_at(np.array(looks), curve, 40 * math.sqrt(2)) == pytest.approx(0.35)
    assert [value_at(np.array(looks), curve, one) for one in (5, 1000)] == [0.2, 0.6]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1, 2, 3], 2 / 8),  # only all signs alike are as extreme
        ([1, 2, 3, -0.5], 4 / 16),  # a sum of 5.5: without the smallest, or with it
        ([1, -1], 1.0),
        ([0, 0, 0], 1.0),
        ([1] * 10, 2 / 1024),
    ],
)
def test_the_permutation_test_of_few_subjects_tries_all_signs(differences: list[float], expected: float) -> None:
    assert sign_flip_p(np.array(differences, float)) == expected


def test_the_permutation_test_of_many_subjects_draws_signs() -> None:
    rng = np.random.default_rng(1)
    assert sign_flip_p(rng.normal(1, 1, 28)) < 0.001
    falsely = [sign_flip_p(rng.normal(0, 1, 24)) < 0.05 for _ in range(200)]
    assert 0.01 < np.mean(falsely) < 0.1


def test_holm_corrects_in_the_order_of_the_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_equivalence_needs_the_whole_interval_within_the_margin() -> None:
    small = MARGIN / 10 * np.array([1, -1] * 12)
    assert compared(small, 0.5) == "equivalent"
    assert compared(40 * small, 0.5) == "open"
    assert compared(small + MARGIN, 0.5) == "open"
    assert [compared(small + sign * MARGIN, 0.01) for sign in (1, -1)] == ["ahead", "behind"]


def test_an_interval_is_that_of_the_normal_mean() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, 400)
    low, high = bootstrap(values, lambda some: float(some.mean()))
    half = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.02)
    assert bootstrap(np.full(5, 0.5), lambda some: float(some.mean())) == (0.5, 0.5)


def test_variance_between_subjects_and_seeds_says_how_many_seeds_are_needed() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 0.2, (2000, 1)) + rng.normal(0, 0.1, (2000, 3))
    between, within = variance_components(differences)
    assert (between, within) == pytest.approx((0.04, 0.01), rel=0.1)
    assert variance_components(np.array([[0.0, 1.0], [1.0, 0.0]]))[0] == 0
    # (0.03 / 2.80)² of 28 subjects is 0.0032: what seeds may leave beside the subjects.
    assert seeds_needed(0.0, 0.0031, 28) == 1
    assert seeds_needed(0.0022, 0.0031, 28) == 4
    assert seeds_needed(0.01, 0.001, 28) == math.inf
