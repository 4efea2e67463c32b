from __future__ import annotations

from pathlib import Path

from tools.mutation import MUTATIONS, found


def test_every_mutation_has_its_line() -> None:
    for mutation in MUTATIONS:
        found(mutation, Path(__file__).parents[2])
