"""A few kills of the two hundred that `make crash` does."""

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
