"""Averages with a power function: recursion, weights and lengths of the paper, and one made of others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.power_average import LENGTHS, LONGEST, coefficients, exponent, kept_share, length, profile


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_lengths_are_those_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    root = max(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real)  # algorithm 2
    assert exponent(sigma_rel) == pytest.approx(root)
    weights, steps = profile(5000, gamma, 5000), np.arange(1, 5001)
    mean = (weights * steps).sum()
    assert math.sqrt((weights * (steps - mean) ** 2).sum()) / 5000 == pytest.approx(sigma_rel, rel=1e-3)


def test_the_recursion_has_these_weights() -> None:
    gamma, values = exponent(0.1), np.random.default_rng(0).normal(size=40)
    average = 100.0  # what was before the first step does not count
    for step, value in enumerate(values, 1):
        share = kept_share(step, gamma)
        average = share * average + (1 - share) * value
        assert average == pytest.approx(float(profile(step, gamma, 40) @ values))


def test_the_shortest_is_the_last_step_and_the_longest_their_mean() -> None:
    assert profile(20, exponent(1e-4), 30)[19] == pytest.approx(1.0)
    assert profile(20, exponent(LONGEST), 30) == pytest.approx([1 / 20] * 20 + [0] * 10)
    assert length(0.0) == pytest.approx(LONGEST)
    for wrong in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(OptionError, match=r"must be above 0 and at most 0\.289"):
            exponent(wrong)


def test_any_length_is_made_of_two_that_are_saved_eight_times() -> None:
    for sigma_rel, most in [(0.04, 0.1), (0.05, 1e-6), (0.07, 0.02), (0.1, 1e-6), (0.15, 0.05), (0.2, 0.1)]:
        saved = [(step, exponent(one)) for step in range(100, 801, 100) for one in LENGTHS]
        factors, error = coefficients(saved, (800, exponent(sigma_rel)), 800)

        assert factors.sum() == pytest.approx(1.0)
        assert error < most
        _, without = coefficients(saved[-2:], (800, exponent(sigma_rel)), 800)
        assert without >= error - 1e-12
