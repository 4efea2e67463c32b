"""The tables of `benchmarks.quality`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.quality.measuring import STRENGTHS, Checkpoint, Job, Outcome
from benchmarks.quality.scores import hypervolume, interval
from benchmarks.quality.subjects import STYLE
from benchmarks.results import Results

MEASURES = ("fidelity", "likeness", "adherence", "diversity", "memorisation", "drift", "bleed")


def name_of(job: Job) -> str:
    """The recipe with what was changed of it."""
    changes = "".join(f" {name}={value}" for name, value in job.changes.items())
    return f"{job.recipe}{', in ComfyUI' if job.in_comfyui else ''}{changes}"


def recipe_tables(outcomes: Sequence[Outcome], results: Results) -> None:
    """A row for each recipe and number of pictures: hypervolume, measures by checkpoint, and by strength."""
    kinds = _by_kind(outcomes)
    columns = {"recipe": "", "rate ×": "g", "pictures": "d", "runs": "d", "hypervolume": ".3f", "95 % interval": ""}
    columns |= {
        "of seeds alone": "",
        "less than the first": "+.3f",
        "95 % interval of it": "",
        "style": ".3f",
        "per minute of training": ".3f",
    }
    results.table(columns, "Area under the curve of fidelity against adherence over the checkpoints, of the subjects")
    firsts: dict[int, dict[tuple[str, int, int], Outcome]] = {}
    for kind, runs in kinds.items():
        subjects, styles = ([one for one in runs if (one.job.task == STYLE) is is_style] for is_style in (False, True))
        first = firsts.setdefault(kind[-1], {_pair(one): one for one in subjects})
        values = _by_subject(subjects, _hypervolume)
        mean, low, high = interval(values)
        _, *seeds = interval(values, of_subjects=False)
        by_seed = "{:.3f} to {:.3f}".format(*seeds) if min(map(len, values.values())) > 1 else None
        behind = _behind([one for one in subjects if _pair(one) in first], first)
        style = statistics.mean(map(_hypervolume, styles)) if styles else None
        rate = mean / _minutes(subjects)
        results.add(*kind, len(subjects), mean, f"{low:.3f} to {high:.3f}", by_seed, *behind, style, rate)
    columns = {"recipe": "", "rate ×": "g", "pictures": "d", "seen": "d"}
    results.table({**columns, **dict.fromkeys(MEASURES, ".3f")}, "Means by checkpoint")
    for kind, runs in kinds.items():
        for checkpoints in zip(*(one.checkpoints for one in runs), strict=True):
            results.add(*kind, checkpoints[0].looks, *(_mean(checkpoints, measure) for measure in MEASURES))
    columns = {"recipe": "", "rate ×": "g", "pictures": "d", **dict.fromkeys(map(str, STRENGTHS), ".2f")}
    results.table(
        {**columns, "monotone up to 1": ".2f"}, "Fidelity of the last checkpoint by strength, of the first seed"
    )
    for kind, runs in kinds.items():
        if firsts := [one.strengths for one in runs if one.strengths]:
            means = map(statistics.mean, zip(*firsts, strict=True))
            results.add(*kind, *means, statistics.mean(map(_is_monotone, firsts)))


def methods_table(outcomes: Sequence[Outcome], results: Results) -> None:
    """A row for each method: what it changes against the first rows' runs of the same subject and seed."""
    (_, plain), *others = _by_kind(outcomes).items()
    before = {_pair(one): one for one in plain}
    columns = {"method": "", "runs": "d", "hypervolume": ".3f", "difference": "+.3f", "95 % interval": ""}
    columns |= {"time of training": ".2f", "per minute of training": ".3f", **dict.fromkeys(MEASURES, "+.3f")}
    results.table(columns, "Difference of each method from the recipe alone, subject by subject and seed by seed")
    total, minutes = statistics.mean(map(_hypervolume, plain)), _minutes(plain)
    results.add(plain[0].job.recipe, len(plain), total, None, None, 1.0, total / minutes, *[None] * len(MEASURES))
    for (name, *_), runs in others:
        gains = _by_subject(runs, lambda one: _hypervolume(one) - _hypervolume(before[_pair(one)]))
        mean, low, high = interval(gains)
        ends = [one.checkpoints[-1] for one in runs]
        ends_before = [before[_pair(one)].checkpoints[-1] for one in runs]
        taken = _minutes(runs)
        measured = [_mean(ends, measure) - _mean(ends_before, measure) for measure in MEASURES]
        total, name = statistics.mean(map(_hypervolume, runs)), name.removeprefix(f"{plain[0].job.recipe} ")
        between = f"{low:+.3f} to {high:+.3f}"
        results.add(name, len(runs), total, mean, between, taken / minutes, total / taken, *measured)


def _minutes(runs: Sequence[Outcome]) -> float:
    """Of processor time, of training a run."""
    return statistics.mean(one.checkpoints[-1].seconds for one in runs) / 60


def _behind(runs: Sequence[Outcome], first: Mapping[tuple[str, int, int], Outcome]) -> tuple[float | None, str | None]:
    """How much hypervolume runs lack of the first ones with the same subject and seed, with the interval."""
    if all(first[_pair(one)] is one for one in runs):
        return None, None
    mean, low, high = interval(_by_subject(runs, lambda one: _hypervolume(first[_pair(one)]) - _hypervolume(one)))
    return mean, f"{low:+.3f} to {high:+.3f}"


def _by_kind(outcomes: Sequence[Outcome]) -> dict[tuple[str, float, int], list[Outcome]]:
    kinds: dict[tuple[str, float, int], list[Outcome]] = {}
    for one in outcomes:
        kinds.setdefault((name_of(one.job), one.job.factor, one.job.pictures), []).append(one)
    return kinds


def _pair(outcome: Outcome) -> tuple[str, int, int]:
    return outcome.job.task, outcome.job.pictures, outcome.job.seed


def _hypervolume(outcome: Outcome) -> float:
    return hypervolume([(one.fidelity, one.adherence or 0.0) for one in outcome.checkpoints])


def _by_subject(runs: Iterable[Outcome], value: Callable[[Outcome], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in runs:
        found.setdefault(one.job.task, []).append(value(one))
    return found


def _mean(checkpoints: Iterable[Checkpoint], measure: str) -> float:
    """Of those that have it, as a style has no bleed, and without a CLIP nothing has adherence."""
    values = [value for one in checkpoints if (value := getattr(one, measure)) is not None]
    return statistics.mean(values) if values else float("nan")


def _is_monotone(strengths: Sequence[float]) -> bool:
    """Whether a stronger LoRA shows the subject no less, up to a strength of 1."""
    up_to_one = strengths[: STRENGTHS.index(1.0) + 1]
    return all(after >= before - 0.05 for before, after in itertools.pairwise(up_to_one))
