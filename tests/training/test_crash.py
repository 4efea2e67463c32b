"""Eight kills of the two hundred that `make crash` does."""

from __future__ import annotations

import os
import random

import pytest

from tests.training.crash import CASES, trials


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_runs_that_are_killed_end_as_if_nothing_had_happened() -> None:
    chance = random.Random(1)
    kills = runs = 0
    with trials() as trial:
        while kills < 8 or runs < len(CASES):
            kills += trial.trial(list(CASES)[runs % len(CASES)], chance)
            runs += 1
