"""A few of the kills of `python -m tests.server.crash`."""

from __future__ import annotations

import os
import random

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes with signals")
def test_jobs_survive_killed_servers_and_workers() -> None:
    from tests.server.crash import trials

    chance, kills = random.Random(1), 0
    with trials() as trial:
        while kills < 5:
            kills += trial.trial(chance)
