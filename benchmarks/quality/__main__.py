"""What LoRAs learn, by recipe: like the subject, obedient to the prompt, harmless to the rest.

    python -m benchmarks.quality tune --folder quality --models lorasmith-tiny drawing-transformer.safetensors
    python -m benchmarks.quality test --folder quality --models lorasmith-tiny drawing-transformer.safetensors \\
        --docs docs
    python -m benchmarks.quality try --folder quality --change preserve=blank --change ema_decay=0.99
    python -m benchmarks.quality test --folder quality --recipes comfyui --comfyui ComfyUI ComfyUI/.venv/bin/python
    python -m benchmarks.quality tune --folder photos --models sdxl.safetensors --subjects dreambooth/dataset \\
        --clip DIR --dino DIR --recipes lorasmith comfyui --pictures 4 --factors 0.5 1 2 \\
        --looks 200 400 800 1600 --workers 1 --frozen photos.json

`tune` trains each recipe at five rates on the development subjects and freezes the best ones. `test` trains the frozen
recipes on the test subjects and styles. `try` compares the first recipe, at its frozen rates, with changes of it, on
the development subjects; so do ablations. With another model, subjects come from a folder like DreamBooth's, and image
features take the judge's place.

Runs are kept in the folder, and none is made twice: an interrupted command continues, several may share the folder, and
folders of several machines (`--share 1/2`) may be put together. They are made subject by subject, so that the tables of
what is there compare equals. `--only-known` makes the tables alone. `--record` puts the measures of a folder, without
pictures, into a file of this package; what is in it is not made again either.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import machine
from benchmarks.quality.measuring import JUDGED, RECORD, TINY, Job, Outcome, Setting, Store
from benchmarks.quality.page import sheet, write_page
from benchmarks.quality.protocol import FROZEN, LOOKS, final, freeze, frozen_rates, lengths_of, tuning
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.subjects import DEVELOPMENT, DEVELOPMENT_STYLES, TEST, TEST_STYLES
from benchmarks.quality.tables import (
    candidate_table,
    difference_table,
    measures_table,
    name_of,
    reach_table,
    summary_table,
    tuning_table,
)
from benchmarks.results import Results, add_json


def main() -> None:
    arguments = _arguments()
    comfyui = tuple(arguments.comfyui) if arguments.comfyui else None
    facts = arguments.subjects, arguments.clip, arguments.dino, comfyui
    settings = [Setting(tuple(arguments.looks), model, *facts) for model in arguments.models]
    each = [[(one, job) for job in _jobs(arguments, one)] for one in settings]
    # Of all networks in turn, so that what is there after an interruption is of all of them.
    runs = [one for some in itertools.zip_longest(*each) for one in some if one is not None]
    store = Store(arguments.folder)
    if not arguments.only_known:
        share, shares = map(int, arguments.share.split("/"))
        store.make(runs[share - 1 :: shares], arguments.workers, time.time() + 60 * arguments.minutes)
    if arguments.record:
        store.record()
    known = [(setting, job, store.known(setting, job)) for setting, job in runs]
    # A recipe counts for a subject and seed once all of its runs are there, of each length and factor.
    unfinished = {_unit(setting, job) for setting, job, outcome in known if outcome is None}
    found = [one for setting, job, one in known if one is not None and _unit(setting, job) not in unfinished]
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    there = sum(one is not None for *_, one in known)
    print(f"\n{there} of {len(runs)} runs are there, {len(found)} are in the tables")
    _tables(arguments, settings[0], found, results)
    if arguments.docs:
        methods, part = arguments.docs / "quality-methods.md", arguments.part or arguments.phase
        first = 1 if arguments.phase == "test" else 0
        write_page(methods, part, results.markdown(first))
        if first:
            write_page(arguments.docs / "quality.md", part, results.markdown(0, first))
            if drawn := [one for one in found if one.strip.exists()]:
                sheet(drawn, arguments.looks).save(arguments.docs / "images" / "quality.webp", quality=85)


def _tables(arguments: argparse.Namespace, setting: Setting, found: list[Outcome], results: Results) -> None:
    lengths = lengths_of(setting)
    if arguments.phase == "tune":
        tuning_table(found, lengths, results)
        freeze(found, lengths, arguments.frozen)
    elif arguments.phase == "try":
        candidate_table(found, lengths, results)
    else:
        summary_table(found, setting.looks, results)
        reach_table(found, setting.looks, results)
        difference_table(found, setting.looks, results)
        measures_table(found, lengths[-1], results)


def _jobs(arguments: argparse.Namespace, setting: Setting) -> list[Job]:
    """In the order in which they are made."""
    known = [*setting.tasks()]
    if not arguments.subjects:
        known = [*TEST, *TEST_STYLES] if arguments.phase == "test" else [*DEVELOPMENT, *DEVELOPMENT_STYLES]
    tasks = arguments.tasks or known
    chosen = tasks, arguments.pictures, arguments.seeds
    if arguments.phase == "tune":
        return tuning(setting, arguments.recipes, *chosen, arguments.factors)
    if arguments.phase == "test":
        jobs = final(setting, arguments.recipes, *chosen, frozen_rates(arguments.frozen))
        if arguments.comfyui and setting.model == TINY:
            jobs += [replace(one, in_comfyui=True) for one in jobs if one.recipe == "comfyui"]
    else:
        first = final(setting, arguments.recipes[:1], *chosen, frozen_rates(arguments.frozen))
        changes: list[dict[str, Any]] = [{}, *(dict(map(_change, one.split(","))) for one in arguments.change)]
        jobs = [replace(one, changes=some, is_evaluated=False) for some in changes for one in first]
        if arguments.captions:
            jobs += [replace(one, is_captioned=True) for one in jobs]
    return sorted(jobs, key=lambda one: (one.seed, tasks.index(one.task)))


def _unit(setting: Setting, job: Job) -> tuple[str, str, str, int, int]:
    return setting.network, name_of(job), job.task, job.pictures, job.seed


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["tune", "test", "try"])
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so long")
    parser.add_argument("--only-known", action="store_true", help="train nothing, make the tables of what is there")
    parser.add_argument("--record", action="store_true", help=f"put what the folder has on record in {RECORD.name}")
    parser.add_argument("--share", default="1/1", metavar="NUMBER/SHARES", help="make this share of the runs alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes with a thread each")
    parser.add_argument("--models", nargs="+", default=[TINY])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument("--tasks", nargs="+", default=[], help="subjects and styles; those of the phase by default")
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4, 12], choices=[1, 4, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--factors", nargs="+", type=float, default=[], help="of the documents' rates, to tune")
    parser.add_argument("--frozen", type=Path, default=FROZEN, help="file of the best factors")
    parser.add_argument("--looks", nargs="+", type=int, default=LOOKS, help="pictures seen at each checkpoint")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="what to try: a row of the first recipe with other settings",
    )
    parser.add_argument(
        "--captions", action="store_true", help="try each also with captions that say style and background"
    )
    parser.add_argument("--subjects", type=Path, help="a folder like DreamBooth's dataset")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP of transformers, for adherence")
    parser.add_argument("--dino", type=Path, help="folder of a DINO of transformers, for fidelity")
    parser.add_argument(
        "--comfyui", nargs=2, type=Path, metavar=("CHECKOUT", "PYTHON"), help="its recipe there, too, on the UNet"
    )
    parser.add_argument("--docs", type=Path, help="put the tables between the marks of the pages in this folder")
    parser.add_argument("--part", default="", help="of the pages, if it is not that of the phase, such as ablation")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.subjects is None and any(Path(one).stem not in JUDGED for one in arguments.models):
        parser.error("--models needs --subjects, as the judge knows drawings alone")
    if len(arguments.looks) < 4:
        parser.error("--looks needs at least four numbers, of which those between the first and the last are tuned")
    return arguments


if __name__ == "__main__":
    main()
