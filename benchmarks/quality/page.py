"""The tables and pictures of the pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.quality.measuring import Outcome
from benchmarks.quality.protocol import at
from benchmarks.quality.recipes import OURS
from lorasmith.report.contact_sheet import contact_sheet

_ROWS = 8  # of the first subjects, in the order of the table


def write_page(page: Path, part: str, tables: str) -> None:
    """Put tables between the marks of a part of a page."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}", "utf-8")


def sheet(outcomes: Sequence[Outcome], looks: Sequence[int]) -> Image.Image:
    """A row a subject and a column a recipe, after equal time: what ours takes for its last checkpoint but two."""
    first = outcomes[0].network, 4, outcomes[0].job.seed
    runs: dict[str, dict[str, list[Outcome]]] = {}
    for one in outcomes:
        if (one.network, one.job.pictures, one.job.seed) == first and not one.job.in_comfyui:
            runs.setdefault(one.job.task, {}).setdefault(one.job.recipe, []).append(one)
    recipes = list(dict.fromkeys(recipe for by_recipe in runs.values() for recipe in by_recipe))
    rows = {task: by for task, by in runs.items() if len(by) == len(recipes) and OURS in by}
    tasks = [*rows][:_ROWS]
    cells = [[_strip(rows[task][one], rows[task][OURS], looks) for one in recipes] for task in tasks]
    return contact_sheet(cells, tasks, recipes)


def _strip(runs: Sequence[Outcome], ours: Sequence[Outcome], looks: Sequence[int]) -> Image.Image:
    """The pictures of the last checkpoint that a recipe has after as many seconds as ours."""
    seconds = at(ours, looks[-3])[1].seconds
    known = [(one.seconds, outcome.strip, row) for outcome in runs for row, one in enumerate(outcome.checkpoints)]
    _, strip, row = max((one for one in known if one[0] <= seconds), default=min(known), key=lambda one: one[0])
    with Image.open(strip) as opened:
        height = opened.height // next(len(one.checkpoints) for one in runs if one.strip == strip)
        return opened.crop((0, height * row, opened.width, height * (row + 1))).convert("RGB")
