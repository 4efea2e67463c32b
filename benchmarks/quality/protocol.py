"""Which runs are made: those that tune each recipe on development subjects, and the final ones on test subjects.

The last checkpoint but one (160 pictures seen) is the one at which the best peer sets the level. Each recipe is tuned
for it and for the ones before it but the first: of five rates, each number of pictures seen has the best one. The last
checkpoint shows whether curves fall.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.measuring import TINY, Checkpoint, Job, Outcome, Setting
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.subjects import DEVELOPMENT_STYLES, TEST_STYLES
from lorasmith.core.files import write_atomic

LOOKS = (20, 40, 80, 160, 320)
FROZEN = Path(__file__).with_name("frozen.json")
"""Factors of the rates by network, recipe, number of drawings (of a style) and pictures seen, as `tune` chose them."""

TAUGHT_STYLES = {*DEVELOPMENT_STYLES, *TEST_STYLES}
Frozen = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]


def lengths_of(setting: Setting) -> tuple[int, ...]:
    """Pictures seen for which recipes are tuned."""
    return setting.looks[1:-1]


def tuning(
    setting: Setting,
    recipes: Sequence[str],
    tasks: Sequence[str],
    pictures: Sequence[int],
    seeds: Sequence[int],
    factors: Sequence[float] = (),
) -> list[Job]:
    """Each recipe at each factor; one with a constant rate is read off the longest run."""
    lengths = lengths_of(setting)
    return [
        Job(recipe, task, number, seed, factor, length=length)
        for seed, task, number, recipe in itertools.product(seeds, tasks, pictures, recipes)
        for factor in factors or RECIPES[recipe].factors
        for length in (lengths[-1:] if RECIPES[recipe].is_constant else lengths)
    ]


def final(
    setting: Setting,
    recipes: Sequence[str],
    tasks: Sequence[str],
    pictures: Sequence[int],
    seeds: Sequence[int],
    frozen: Frozen,
) -> list[Job]:
    """Each recipe at its frozen rates."""
    return [
        Job(recipe, task, number, seed, factor, length=length, is_evaluated=True)
        for seed, task, number, recipe in itertools.product(seeds, tasks, pictures, recipes)
        for length, factor in _frozen_runs(setting, recipe, task, number, frozen)
    ]


def _frozen_runs(setting: Setting, recipe: str, task: str, pictures: int, frozen: Frozen) -> list[tuple[int, float]]:
    """The (length, factor) of the runs that make the curve; what was not tuned is as for four drawings of a subject."""
    tuned = frozen.get(setting.network, frozen.get(TINY, {})).get(recipe)
    if tuned is None:
        raise SystemExit(f"{recipe} has no frozen rate on {setting.network}; tune it first")
    factors = tuned.get(_taught(task, pictures), tuned.get(str(pictures), tuned["4"]))
    runs = [(length, factors[str(length)]) for length in lengths_of(setting)]
    if not RECIPES[recipe].is_constant:
        return runs
    # A run at a constant rate contains the shorter ones, and continues until its curve falls.
    longest = {factor: length for length, factor in runs}
    longest[runs[-1][1]] = setting.looks[-1]
    return [(length, factor) for factor, length in longest.items()]


def _taught(task: str, pictures: int) -> str:
    return f"{pictures} of a style" if task in TAUGHT_STYLES else str(pictures)


def frozen_rates(file: Path) -> Frozen:
    """What `freeze` has written so far."""
    found: Frozen = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def freeze(outcomes: Iterable[Outcome], lengths: Sequence[int], file: Path) -> None:
    """Write the factor of each recipe with the best mean score, of the subjects and seeds that all factors have."""
    found: dict[tuple[str, str, str, str], dict[float, dict[tuple[str, int], float]]] = {}
    for one in outcomes:
        for length, score in ends_of(one, lengths).items():
            key = one.network, one.job.recipe, _taught(one.job.task, one.job.pictures), str(length)
            found.setdefault(key, {}).setdefault(one.job.factor, {})[one.job.task, one.job.seed] = score
    chosen: Any = frozen_rates(file)
    for (network, recipe, pictures, length), by_factor in sorted(found.items()):
        common = set.intersection(*map(set, by_factor.values()))
        if common:
            means = {factor: statistics.mean(by[one] for one in common) for factor, by in by_factor.items()}
            place = chosen.setdefault(network, {}).setdefault(recipe, {}).setdefault(pictures, {})
            place[length] = max(means, key=means.__getitem__)
    write_atomic(file, json.dumps(chosen, indent=1) + "\n")


def ends_of(outcome: Outcome, lengths: Sequence[int]) -> dict[int, float]:
    """The score at each length for which a run was tuned: at a constant rate those on its way, otherwise its end."""
    last = outcome.checkpoints[-1].looks
    ends = lengths if RECIPES[outcome.job.recipe].is_constant else [last]
    return {one.looks: one.score for one in outcome.checkpoints if one.looks in ends and one.looks in lengths}


def at(runs: Sequence[Outcome], looks: int) -> tuple[Checkpoint, Checkpoint]:
    """What a user has after so many pictures: the checkpoint that `lorasmith evaluate` picks, and the last one.

    It is of the shortest run of a subject and seed that is long enough. Without an evaluation, or where it recommends
    nothing, the picked one is the last.
    """
    long_enough = [one.checkpoints for one in runs if one.checkpoints[-1].looks >= looks]
    shortest = min(long_enough, key=lambda checkpoints: checkpoints[-1].looks)
    until = [one for one in shortest if one.looks <= looks]
    picked = max(until, key=lambda one: one.evaluation or 0.0)
    return (picked if picked.evaluation else until[-1]), until[-1]
