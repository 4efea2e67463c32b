"""The tables and pictures of docs/quality.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.quality.measuring import Outcome, joined
from benchmarks.results import Results
from lorasmith.report.contact_sheet import contact_sheet

PICTURES = "images/quality.webp"
_SHOWN = (0, 1, 3, 5)  # the trigger, and prompts


def write_page(page: Path, results: Results, outcomes: Sequence[Outcome], part: str) -> None:
    """Put the tables between the marks of a part of a page, and the recipes' pictures into its folder."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{results.markdown(after=1)}\n\n{end}{after}", "utf-8")
    if part == "recipes":
        _sheet(outcomes).save(page.parent / PICTURES, quality=85)


def _sheet(outcomes: Sequence[Outcome]) -> Image.Image:
    """A row a subject and a column a recipe, of the runs with four pictures."""
    shown = [one for one in outcomes if one.job.pictures == 4 and not one.job.changes and not one.job.in_comfyui]
    recipes = list(dict.fromkeys(one.job.recipe for one in shown))
    tasks = list(dict.fromkeys(one.job.task for one in shown))
    rows = [
        [
            _strip(_median([one for one in shown if (one.job.task, one.job.recipe) == (task, recipe)]))
            for recipe in recipes
        ]
        for task in tasks
    ]
    return contact_sheet(rows, tasks, recipes)


def _median(runs: Sequence[Outcome]) -> Outcome:
    """The run whose last fidelity is in the middle: pictures are chosen by this rule alone."""
    middle = statistics.median_low(one.checkpoints[-1].fidelity for one in runs)
    return next(one for one in runs if one.checkpoints[-1].fidelity == middle)


def _strip(outcome: Outcome) -> Image.Image:
    return joined([outcome.pictures[place] for place in _SHOWN])
