"""What LoRAs learn, by recipe: like the subject, obedient to the prompt, harmless to the rest.

    python -m benchmarks.quality --page docs/quality.md --json quality.json
    python -m benchmarks.quality --quick
    python -m benchmarks.quality --recipes lorasmith --change preserve=blank --change ema_decay=0.99
    python -m benchmarks.quality --recipes diffusers --factors 1 3 10 30

Seven subjects and a style that the built-in model has never seen are taught with each recipe; the pictures that each
checkpoint draws are judged. `--page` puts the tables between the marks of a page, and the pictures beside it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import machine
from benchmarks.quality.measuring import STRENGTHS, Bench, Checkpoint, Job, Outcome
from benchmarks.quality.page import write_page
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.scores import hypervolume, interval
from benchmarks.quality.subjects import all_tasks
from benchmarks.results import Results, add_json

LOOKS = (80, 160, 320)
_MEASURES = ("fidelity", "likeness", "adherence", "diversity", "memorisation", "drift", "bleed")


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    outcomes = list(_outcomes(_jobs(arguments), arguments))
    report(outcomes, results)
    if arguments.page:
        write_page(arguments.page, results.markdown(), outcomes)


def report(outcomes: Sequence[Outcome], results: Results) -> None:
    """Print the tables."""
    kinds = sorted({_kind(one) for one in outcomes}, key=lambda kind: [*map(_kind, outcomes)].index(kind))
    results.table(
        {"recipe": "", "pictures": "d", "hypervolume": ".3f", "95 % interval": "", "per minute of training": ".3f"},
        "Area under the curve of fidelity against adherence over the checkpoints",
    )
    for name, pictures in kinds:
        runs = [one for one in outcomes if _kind(one) == (name, pictures)]
        mean, low, high = interval(_by_subject(runs, lambda one: hypervolume(_curve(one))))
        minutes = statistics.mean(one.checkpoints[-1].seconds for one in runs) / 60
        results.add(name, pictures, mean, f"{low:.3f} to {high:.3f}", mean / minutes)
    columns = {"recipe": "", "pictures": "d", "looks": "d", **dict.fromkeys(_MEASURES, ".3f")}
    results.table(columns, "Mean of each measure by checkpoint")
    for name, pictures in kinds:
        runs = [one for one in outcomes if _kind(one) == (name, pictures)]
        for place, checkpoint in enumerate(runs[0].checkpoints):
            values = [_mean(one.checkpoints[place] for one in runs)(measure) for measure in _MEASURES]
            results.add(name, pictures, checkpoint.looks, *values)
    results.table(
        {"recipe": "", "pictures": "d", **dict.fromkeys(map(str, STRENGTHS), ".2f"), "monotone up to 1": ".2f"},
        "Fidelity of the last checkpoint by strength",
    )
    for name, pictures in kinds:
        runs = [one for one in outcomes if _kind(one) == (name, pictures)]
        means = [statistics.mean(values) for values in zip(*(one.strengths for one in runs), strict=True)]
        results.add(name, pictures, *means, statistics.mean(_is_monotone(one.strengths) for one in runs))


def _kind(outcome: Outcome) -> tuple[str, int]:
    job = outcome.job
    changes = "".join(f" {name}={value}" for name, value in job.changes.items())
    factor = "" if job.factor == Job.factor or RECIPES[job.recipe].rate is None else f" ×{job.factor:g}"
    return f"{job.recipe}{factor}{changes}", job.pictures


def _curve(outcome: Outcome) -> list[tuple[float, float]]:
    return [(one.fidelity, one.adherence) for one in outcome.checkpoints]


def _by_subject(runs: Iterable[Outcome], value: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in runs:
        found.setdefault(one.job.task, []).append(value(one))
    return found


def _mean(checkpoints: Iterable[Checkpoint]) -> Any:
    found = list(checkpoints)
    return lambda measure: statistics.mean(getattr(one, measure) for one in found)


def _is_monotone(strengths: Sequence[float]) -> bool:
    """Whether a stronger LoRA shows the subject no less, up to a strength of 1."""
    up_to_one = strengths[: STRENGTHS.index(1.0) + 1]
    return all(after >= before - 0.05 for before, after in zip(up_to_one, up_to_one[1:], strict=False))


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    few = {1: arguments.seeds[:2], 4: arguments.seeds, 12: arguments.seeds[:2]}
    recipes: list[tuple[str, Mapping[str, Any]]] = [(one, {}) for one in arguments.recipes]
    recipes += [(arguments.recipes[0], dict([_change(one)])) for one in arguments.change]
    return [
        Job(recipe, task.name, pictures, seed, factor, changes)
        for recipe, changes in recipes
        for pictures in arguments.pictures
        for factor in (arguments.factors if RECIPES[recipe].rate is not None else arguments.factors[:1])
        for task in all_tasks()
        if task.name in arguments.tasks
        for seed in few[pictures]
    ]


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _outcomes(jobs: Sequence[Job], arguments: argparse.Namespace) -> Iterator[Outcome]:
    """The outcome of each job in order, of several processes with a thread each."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, initializer=_prepare, initargs=(arguments.looks,)) as pool:
        for number, outcome in enumerate(pool.imap(_run, jobs), 1):
            last = outcome.checkpoints[-1]
            name, pictures = _kind(outcome)
            print(
                f"{number}/{len(jobs)} {name}, {pictures} of {outcome.job.task}, seed {outcome.job.seed}: "
                f"fidelity {last.fidelity:.2f}, adherence {last.adherence:.2f}",
                flush=True,
            )
            yield outcome


def _prepare(looks: tuple[int, ...]) -> None:
    global _bench, _looks, _tasks  # noqa: PLW0603 - of a worker process
    torch.set_num_threads(1)
    os.environ.setdefault("LORASMITH_CACHE_DIR", tempfile.mkdtemp())
    _bench, _looks, _tasks = Bench(), looks, {task.name: task for task in all_tasks()}


def _run(job: Job) -> Outcome:
    outcome = _bench.run(job, _tasks[job.task], _looks)
    return outcome if job.pictures == 4 else dataclasses.replace(outcome, pictures=())


def _arguments() -> argparse.Namespace:
    names = [task.name for task in all_tasks()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a row of the first recipe with another setting",
    )
    parser.add_argument("--factors", nargs="+", type=float, default=[Job.factor], help="of the documents' rates")
    parser.add_argument("--tasks", nargs="+", default=names, choices=names)
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4, 12], choices=[1, 4, 12])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="1 and 12 pictures use the first two"
    )
    parser.add_argument("--looks", nargs="+", type=int, default=LOOKS, help="pictures seen at each checkpoint")
    parser.add_argument(
        "--quick", action="store_true", help="three subjects, one seed, four pictures, ours and two others"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--page", type=Path)
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.recipes, arguments.pictures, arguments.seeds = ["lorasmith", "comfyui", "diffusers"], [4], [0]
        arguments.tasks = ["fox", "rocket", "owl"]
    arguments.looks = tuple(arguments.looks)
    return arguments


if __name__ == "__main__":
    main()
