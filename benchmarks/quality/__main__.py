"""What LoRAs learn, by recipe: like the subject, obedient to the prompt, harmless to the rest.

    python -m benchmarks.quality --page docs/quality.md --json quality.json
    python -m benchmarks.quality --instead methods --page docs/quality.md
    python -m benchmarks.quality --quick
    python -m benchmarks.quality --recipes lorasmith --change preserve=blank --change ema_decay=0.99
    python -m benchmarks.quality --recipes comfyui --comfyui PATH/TO/ComfyUI PATH/TO/ITS/VENV/bin/python
    python -m benchmarks.quality --model sdxl.safetensors --subjects dreambooth/dataset --clip DIR --dino DIR \
        --pictures 4 --factors 1 --looks 400 800 1600 --workers 1

Seven subjects and a style that the built-in model has never seen are taught with each recipe, and the pictures that
each checkpoint draws are judged. The first three recipes teach each with four pictures and every seed, and with one and
twelve and the first seed; the others with four and the first seed (`--full`: everything with every seed, for hours).
`--instead` has rows of methods, of the subjects and the first seed; `routing` those of a transformer, which
`python -m tools.pretrain transformer` makes.
With another model, subjects come from a folder like DreamBooth's, and image features take the judge's place.

`--page` puts the tables between the marks of a page, and the pictures beside it.
"""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import machine
from benchmarks.quality.measuring import JUDGED, TINY, Job, Setting, outcomes_of
from benchmarks.quality.page import write_page
from benchmarks.quality.recipes import METHODS, RECIPES, ROUTING
from benchmarks.quality.subjects import DEVELOPMENT, DEVELOPMENT_STYLES, STYLE
from benchmarks.quality.tables import MEASURES, methods_table, name_of, recipe_tables
from benchmarks.results import Results, add_json

INSTEAD = {"methods": METHODS, "routing": ROUTING}
_FIRST = 3  # recipes that are run with every seed, and with one and twelve pictures


def main() -> None:
    arguments = _arguments()
    setting = Setting(
        tuple(arguments.looks),
        arguments.model,
        arguments.subjects,
        arguments.clip,
        arguments.dino,
        tuple(arguments.comfyui) if arguments.comfyui else None,
        arguments.folder,
    )
    known = [*setting.tasks()] if arguments.subjects else [*DEVELOPMENT, *DEVELOPMENT_STYLES]
    jobs = _jobs(arguments, arguments.tasks or known)
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    columns = {"run": "", "recipe": "", "pictures": "d", "subject": "", "seed": "d", "seen": "d", "s": ".1f"}
    results.table({**columns, **dict.fromkeys(MEASURES, ".3f")}, "Checkpoints")
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for number, outcome in enumerate(outcomes_of(jobs, setting, arguments.workers), 1):
        outcomes.append(outcome)
        for one in outcome.checkpoints:
            values = [getattr(one, measure) for measure in MEASURES]
            run = f"{number}/{len(jobs)}", name_of(outcome.job), outcome.job.pictures, outcome.job.task
            results.add(*run, outcome.job.seed, one.looks, one.seconds, *values)
    (methods_table if arguments.instead else recipe_tables)(outcomes, results)
    if arguments.page:
        write_page(arguments.page, results, outcomes, arguments.instead or "recipes")


def _jobs(arguments: argparse.Namespace, tasks: list[str]) -> list[Job]:
    def seeds(recipe: str, pictures: int) -> list[int]:
        if arguments.full:
            return list(arguments.seeds)
        few, many = (1, len(arguments.seeds)) if recipe in [*RECIPES][:_FIRST] else (0, 1)
        return list(arguments.seeds[: many if pictures == 4 else few])

    first = arguments.recipes[0]
    kinds: list[tuple[str, dict[str, Any]]] = [(one, {}) for one in arguments.recipes]
    kinds += [(first, dict(map(_change, one.split(",")))) for one in arguments.change]
    if arguments.instead:
        kinds = [(first, {}), *((first, dict(one)) for one in INSTEAD[arguments.instead])]
        tasks = [one for one in tasks if one != STYLE]
    return [
        Job(recipe, task, pictures, seed, factor, changes, in_comfyui)
        for recipe, changes in kinds
        for pictures in arguments.pictures
        for factor in (arguments.factors if RECIPES[recipe].rate is not None else arguments.factors[:1])
        for in_comfyui in ([False, True] if arguments.comfyui and recipe == "comfyui" else [False])
        for task in tasks
        for seed in seeds(recipe, pictures)
    ]


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="a row of the first recipe with other settings",
    )
    parser.add_argument("--instead", choices=[*INSTEAD], help="rows of the first recipe with each of these instead")
    parser.add_argument("--factors", nargs="+", type=float, default=[10.0], help="of the documents' rates")
    parser.add_argument("--tasks", nargs="+", default=[], help="those for development by default")
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4, 12], choices=[1, 4, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--looks", nargs="+", type=int, default=[40, 80, 160], help="pictures seen at each checkpoint")
    parser.add_argument("--full", action="store_true", help="every recipe with every seed and number of pictures")
    parser.add_argument("--quick", action="store_true", help="three subjects, one seed, four pictures, three recipes")
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--subjects", type=Path, help="a folder like DreamBooth's dataset")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP of transformers, for adherence")
    parser.add_argument("--dino", type=Path, help="folder of a DINO of transformers, for fidelity")
    parser.add_argument("--comfyui", nargs=2, type=Path, metavar=("CHECKOUT", "PYTHON"), help="its recipe there, too")
    parser.add_argument("--folder", type=Path, help="keep each run's outcome here, and make none again that is there")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--page", type=Path)
    add_json(parser)
    arguments = parser.parse_args()
    if Path(arguments.model).stem not in JUDGED and arguments.subjects is None:
        parser.error("--model needs --subjects, as the judge knows drawings alone")
    if arguments.quick:
        arguments.recipes, arguments.pictures, arguments.seeds = [*RECIPES][:3], [4], [0]
        arguments.tasks = ["fox", "rocket", "owl"]
    if arguments.instead:
        arguments.pictures, arguments.seeds = [4], arguments.seeds[:1]
    return arguments


if __name__ == "__main__":
    main()
