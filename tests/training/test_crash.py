"""A few kills and flipped bits of the hundreds that `make crash` does."""

from __future__ import annotations

import os
import random

import pytest

from tests.training.crash import CASES, trials


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(
    ("wanted", "flips", "cases"),
    [(2, 1, ["buckets", "validation"]), (8, 10, list(CASES))],
)
def test_runs_that_are_killed_and_states_that_rot_change_nothing(wanted: int, flips: int, cases: list[str]) -> None:
    chance = random.Random(1)
    kills = runs = 0
    with trials() as trial:
        while kills < wanted or runs < len(cases):
            kills += trial.trial(cases[runs % len(cases)], chance)
            runs += 1
        for flip in range(flips):
            trial.flip(cases[flip % len(cases)], chance)
