"""A few kills and flipped bits of those that `python -m tests.data.crash_cache` does."""

from __future__ import annotations

import os
import random

import pytest

from tests.data.crash_cache import trials


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_processes_that_are_killed_and_caches_that_rot_change_no_encoding() -> None:
    chance = random.Random(1)
    kills = 0
    with trials() as trial:
        while kills < 5:
            kills += trial.trial(chance)
        costly = sum(trial.flip(chance) for _ in range(15))
    assert costly > 0
