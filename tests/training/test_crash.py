"""A few kills and flipped bits of the hundreds that `make crash` does."""

from __future__ import annotations

import os
import random

import pytest

from tests.training.crash import CASES, trials


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(
    ("wanted", "cases"), [(2, ["buckets", "validation"]), pytest.param(8, list(CASES), marks=pytest.mark.slow)]
)
def test_runs_that_are_killed_end_as_if_nothing_had_happened(wanted: int, cases: list[str]) -> None:
    chance = random.Random(1)
    kills = runs = 0
    with trials() as trial:
        while kills < wanted or runs < len(cases):
            kills += trial.trial(cases[runs % len(cases)], chance)
            runs += 1


@pytest.mark.parametrize("wanted", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_run_state_is_noticed_and_not_used(wanted: int) -> None:
    chance = random.Random(2)
    with trials() as trial:
        for number in range(wanted):
            trial.flip("average" if wanted == 1 else list(CASES)[number % len(CASES)], chance)
