"""The tables and pictures of docs/quality.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.quality.measuring import Outcome
from lorasmith.report.contact_sheet import contact_sheet

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
PICTURES = "images/quality.webp"
_SHOWN = (0, 4, 6, 8)  # the trigger, and prompts


def write_page(page: Path, tables: str, outcomes: Sequence[Outcome]) -> None:
    """Put the tables between the marks of a page, and the pictures into its folder."""
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", "utf-8")
    shown = [one for one in outcomes if one.pictures and not one.job.changes]
    recipes = list(dict.fromkeys(one.job.recipe for one in shown))
    tasks = list(dict.fromkeys(one.job.task for one in shown))
    rows = [
        [
            _strip(_median([one for one in shown if (one.job.task, one.job.recipe) == (task, recipe)]))
            for recipe in recipes
        ]
        for task in tasks
    ]
    sheet = contact_sheet(rows, tasks, recipes)
    sheet.save(page.parent / PICTURES, quality=85)


def _median(runs: Sequence[Outcome]) -> Outcome:
    """The run whose last fidelity is in the middle: pictures are chosen by this rule alone."""
    middle = statistics.median_low(one.checkpoints[-1].fidelity for one in runs)
    return next(one for one in runs if one.checkpoints[-1].fidelity == middle)


def _strip(outcome: Outcome) -> Image.Image:
    pictures = [outcome.pictures[place] for place in _SHOWN]
    strip = Image.new("RGB", (sum(one.width for one in pictures), pictures[0].height))
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width
    return strip
