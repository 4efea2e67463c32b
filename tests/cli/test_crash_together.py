"""Two kills of the twenty that `make crash` does."""

from __future__ import annotations

import random

import pytest

from benchmarks.hosts import missing
from tests.cli.crash_together import trials


@pytest.mark.slow
def test_a_killed_process_and_a_killed_host_change_nothing() -> None:
    if reason := missing():
        pytest.skip(reason)
    chance = random.Random(1)
    with trials() as trial:
        for kind in ("process", "host"):
            by_agents, told = trial.trial(kind, chance)
            assert by_agents, told
