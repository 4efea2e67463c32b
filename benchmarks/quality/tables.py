"""The tables of `benchmarks.quality`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.measuring import Checkpoint, Job, Outcome
from benchmarks.quality.protocol import TAUGHT_STYLES, at, ends_of
from benchmarks.quality.recipes import OURS, PEERS
from benchmarks.quality.scores import (
    Array,
    bootstrap,
    compared,
    holm,
    reach,
    seeds_needed,
    sign_flip_p,
    value_at,
    variance_components,
)
from benchmarks.quality.subjects import TEST
from benchmarks.results import Results

MEASURES = ("fidelity", "likeness", "adherence", "diversity", "memorisation", "drift", "bleed")


def name_of(job: Job) -> str:
    """The recipe with what was changed of it."""
    changes = "".join(f" {name}={value}" for name, value in job.changes.items())
    return f"{job.recipe}{', in ComfyUI' if job.in_comfyui else ''}{changes}{', captions' if job.is_captioned else ''}"


@dataclass(frozen=True)
class Curve:
    """Of a recipe, at each of the looks: arrays (subjects, looks), means of the seeds."""

    subjects: tuple[str, ...]
    picked: Array  # fidelity × adherence of the checkpoint that the evaluation picks
    last: Array  # of the last one
    seconds: Array  # (looks,), by the median run: other work on the machine slows some

    def of(self, subjects: Sequence[str]) -> Curve:
        """Of some subjects, in that order."""
        rows = [self.subjects.index(one) for one in subjects]
        return Curve(tuple(subjects), self.picked[rows], self.last[rows], self.seconds)


Part = tuple[str, str, int]
"""A network, subjects or styles, and a number of drawings."""


def parts_of(outcomes: Iterable[Outcome]) -> dict[Part, dict[str, list[Outcome]]]:
    """Outcomes by part and recipe."""
    found: dict[Part, dict[str, list[Outcome]]] = {}
    for one in outcomes:
        taught = "styles" if one.job.task in TAUGHT_STYLES else "subjects"
        part = found.setdefault((one.network, taught, one.job.pictures), {})
        part.setdefault(name_of(one.job), []).append(one)
    return found


def curve_of(outcomes: Sequence[Outcome], looks: Sequence[int]) -> Curve | None:
    """The curve over the subjects that have all of the looks; None if there are none."""
    runs: dict[str, dict[int, list[Outcome]]] = {}
    for one in outcomes:
        runs.setdefault(one.job.task, {}).setdefault(one.job.seed, []).append(one)
    rows = {}
    for task, by_seed in runs.items():
        whole = [some for some in by_seed.values() if max(one.checkpoints[-1].looks for one in some) >= looks[-1]]
        if whole:
            seeds = [[(a.score, b.score) for a, b in (at(some, look) for look in looks)] for some in whole]
            rows[task] = np.mean(seeds, axis=0)
    if not rows:
        return None
    table = np.stack(list(rows.values()))
    each = statistics.median(one.checkpoints[-1].seconds / one.checkpoints[-1].looks for one in outcomes)
    return Curve(tuple(rows), table[..., 0], table[..., 1], each * np.array(looks, float))


def _curves(recipes: Mapping[str, list[Outcome]], looks: Sequence[int]) -> tuple[dict[str, Curve], str | None]:
    """Curves by recipe, and which peer is best at the last checkpoint but one; at that one, curves may end."""
    found = {name: curve_of(runs, looks) or curve_of(runs, looks[:-1]) for name, runs in recipes.items()}
    curves = {name: curve for name, curve in found.items() if curve is not None}
    peers = [name for name in curves if name in PEERS]
    return curves, max(peers, key=lambda name: curves[name].picked[:, len(looks) - 2].mean(), default=None)


def summary_table(outcomes: Sequence[Outcome], looks: Sequence[int], results: Results) -> None:
    """When ours has what the best peer has at the last checkpoint but one."""
    columns = {"network": "", "taught": "", "drawings": "d", "best other recipe": "", "its score": ".3f"}
    columns |= {
        "its seconds": ".0f",
        "ours has it after pictures": "",
        "share": "",
        "after seconds": "",
        "share of time": "",
    }
    results.table(columns, f"When our recipe draws as well as the best other one after {looks[-2]} pictures")
    for part, recipes in parts_of(outcomes).items():
        curves, best = _curves(recipes, looks)
        if best and OURS in curves:
            peer, place = curves[best], len(looks) - 2
            pictures, share, _, seconds, of_time = _reach_cells(curves[OURS], peer, looks)
            its = float(peer.picked[:, place].mean()), float(peer.seconds[place])
            results.add(*part, best, *its, pictures, share, seconds, of_time)


def reach_table(outcomes: Sequence[Outcome], looks: Sequence[int], results: Results) -> None:
    """The same of each recipe, with its curve."""
    columns = {"network": "", "taught": "", "drawings": "d", "recipe": "", "subjects": "d"}
    columns |= {f"at {look}": ".3f" for look in looks}
    columns |= dict.fromkeys(
        ("pictures to reach", "share", "by last checkpoints", "seconds to reach", "share of time"), ""
    )
    title = f"Fidelity × adherence by pictures seen, and when it is what the best peer has at {looks[-2]}"
    results.table(columns, title)
    for part, recipes in parts_of(outcomes).items():
        curves, best = _curves(recipes, looks)
        for name, curve in curves.items():
            means = curve.picked.mean(0)
            cells = [*map(float, means), *[None] * (len(looks) - len(means))]
            row = _reach_cells(curve, curves[best], looks) if best else [None] * 5
            results.add(*part, name + (" (best peer)" if name == best else ""), len(curve.subjects), *cells, *row)


def _reach_cells(curve: Curve, peer: Curve, looks: Sequence[int]) -> Sequence[str | None]:
    """Pictures, their share of the peer's, pictures by last checkpoints, seconds, and their share."""
    common = [one for one in curve.subjects if one in peer.subjects]
    if not common:
        return [None] * 5
    curve, peer = curve.of(common), peer.of(common)
    place, cells, every = len(looks) - 2, list[str](), np.arange(len(common))
    pictures = np.array(looks[: curve.picked.shape[1]], float)
    for positions, whole in ((pictures, looks[place]), (curve.seconds, peer.seconds[place])):

        def reached(rows: Array, by: str = "picked", positions: Array = positions) -> float:
            level = float(getattr(peer, by)[rows].mean(0)[place])
            return reach(positions, getattr(curve, by)[rows].mean(0), level)

        found = reached(every), *bootstrap(every, reached)
        shares = [_bounded(one / whole, positions / whole, ".2f") for one in found]
        cells += [_bounded(found[0], positions, ".0f"), "{} ({} to {})".format(*shares)]
        cells.append(_bounded(reached(every, "last"), positions, ".0f"))
    return cells[:-1]


def _bounded(value: float, positions: Array, form: str) -> str:
    """A number, or that it is no more than the first position, or more than the last."""
    if math.isinf(value):
        return f"> {positions[-1]:{form}}"
    return f"{'≤ ' if value == positions[0] else ''}{value:{form}}"


def difference_table(outcomes: Sequence[Outcome], looks: Sequence[int], results: Results) -> None:
    """Ours less each peer: at equal pictures, at equal time, after half of the pictures; ComfyUI's here and there."""
    whole, half = looks[-2], looks[-3]
    columns = {"network": "", "taught": "", "drawings": "d", "recipe": "", "less": "", "how": "", "subjects": "d"}
    columns |= {"difference": "+.3f", "95 % interval": "", "p": ".3f", "p by Holm": ".3f", "it is": ""}
    columns |= {"seeds needed": ""}
    rows: list[tuple[tuple[str | int, ...], Array, str | float]] = []
    for part, recipes in parts_of(outcomes).items():
        for one, other in (*((OURS, peer) for peer in PEERS), ("comfyui", "comfyui, in ComfyUI")):
            some, others = recipes.get(one, []), recipes.get(other, [])
            a, b = curve_of(some, looks[:-1]), curve_of(others, looks[:-1])
            common = [] if a is None or b is None else [subject for subject in a.subjects if subject in b.subjects]
            if a is None or b is None or len(common) < 2:
                continue
            a, b = a.of(common), b.of(common)
            ways = {f"both {whole} pictures": a.picked[:, -1]}
            if one == OURS:
                time = [value_at(a.seconds, curve, b.seconds[-1]) for curve in a.picked]
                ways |= {f"as many seconds as its {whole}": np.array(time), f"{half} less its {whole}": a.picked[:, -2]}
            needed = _seeds(some, others, looks[:-1])
            for how, values in ways.items():
                rows.append(((*part, one, other, how, len(common)), values - b.picked[:, -1], needed))
    results.table(columns, "Difference of fidelity × adherence, by subject")
    _add_compared(rows, results)


def _add_compared(rows: Sequence[tuple[tuple[str | int, ...], Array, str | float]], results: Results) -> None:
    ps = [sign_flip_p(differences) for _, differences, _ in rows]
    for (key, differences, *rest), p, corrected in zip(rows, ps, holm(ps), strict=True):
        low, high = bootstrap(differences, lambda some: float(some.mean()))
        outcome = compared(differences, corrected)
        results.add(*key, float(differences.mean()), f"{low:+.3f} to {high:+.3f}", p, corrected, outcome, *rest)


def _seeds(some: Sequence[Outcome], other: Sequence[Outcome], looks: Sequence[int]) -> str:
    """Seeds of 28 subjects that show a difference of the margin, by what subjects and seeds of these runs vary."""
    by_seed = []
    for seed in sorted({one.job.seed for one in some} & {one.job.seed for one in other}):
        a, b = (curve_of([one for one in runs if one.job.seed == seed], looks) for runs in (some, other))
        if a is not None and b is not None:
            by_seed.append((a, b))
    if len(by_seed) < 2:
        return ""
    common = sorted(set.intersection(*(set(curve.subjects) for pair in by_seed for curve in pair)))
    if len(common) < 2:
        return ""
    differences = np.stack([a.of(common).picked[:, -1] - b.of(common).picked[:, -1] for a, b in by_seed], axis=1)
    found = seeds_needed(*variance_components(differences), len(TEST))
    return f"{found:g}"


def candidate_table(outcomes: Sequence[Outcome], looks: Sequence[int], results: Results) -> None:
    """Each row less the first one, of the same subjects and seeds, by last checkpoints; and the time of training."""
    columns = {"network": "", "taught": "", "drawings": "d", "row": "", "less": "", "pictures": "d", "subjects": "d"}
    columns |= {"difference": "+.3f", "95 % interval": "", "p": ".3f", "p by Holm": ".3f", "is": "", "time": ".2f"}
    rows: list[tuple[tuple[str | int, ...], Array, str | float]] = []
    for part, recipes in parts_of(outcomes).items():
        (first, plain), *others = recipes.items()
        for name, runs in others:
            pairs = {(one.job.task, one.job.seed) for one in plain} & {(one.job.task, one.job.seed) for one in runs}
            a, b = (
                curve_of([one for one in some if (one.job.task, one.job.seed) in pairs], looks)
                for some in (runs, plain)
            )
            if a is None or b is None or len(a.subjects) < 2:
                continue
            b = b.of(a.subjects)
            for place, look in enumerate(looks):
                key = (*part, name.removeprefix(f"{first} "), first, look, len(a.subjects))
                rows.append((key, a.last[:, place] - b.last[:, place], a.seconds[-1] / b.seconds[-1]))
    results.table(columns, "Difference of fidelity × adherence, by subject")
    _add_compared(rows, results)


def tuning_table(outcomes: Sequence[Outcome], lengths: Sequence[int], results: Results) -> None:
    """Each recipe at each factor: the score at each length."""
    columns = {"network": "", "taught": "", "drawings": "d", "recipe": "", "rate ×": "g", "subjects": "d"}
    columns |= {str(one): ".3f" for one in lengths}
    results.table(columns, "Fidelity × adherence on development subjects, by the factor of the rates")
    for part, recipes in parts_of(outcomes).items():
        for name, runs in recipes.items():
            for factor in sorted({one.job.factor for one in runs}):
                some = [one for one in runs if one.job.factor == factor]
                ends = [ends_of(one, lengths) for one in some]
                scores = [[one[length] for one in ends if length in one] for length in lengths]
                means = (statistics.mean(one) if one else None for one in scores)
                results.add(*part, name, factor, len({one.job.task for one in some}), *means)


def measures_table(outcomes: Sequence[Outcome], look: int, results: Results) -> None:
    """Means of all measures at one of the looks, of the last checkpoints."""
    columns = {"network": "", "taught": "", "drawings": "d", "recipe": "", "runs": "d"}
    results.table({**columns, **dict.fromkeys(MEASURES, ".3f")}, f"Measures after {look} pictures")
    for part, recipes in parts_of(outcomes).items():
        for name, runs in recipes.items():
            long_enough = [one for one in runs if one.checkpoints[-1].looks >= look]
            least = min((one.checkpoints[-1].looks for one in long_enough), default=0)
            found = [
                c
                for one in long_enough
                if one.checkpoints[-1].looks == least
                for c in one.checkpoints
                if c.looks == look
            ]
            if found:
                results.add(*part, name, len(found), *(_mean(found, measure) for measure in MEASURES))


def _mean(checkpoints: Iterable[Checkpoint], measure: str) -> float | None:
    """Of those that have it: a style has no bleed, and without a CLIP nothing has adherence."""
    values = [value for one in checkpoints if (value := getattr(one, measure)) is not None]
    return statistics.mean(values) if values else None
