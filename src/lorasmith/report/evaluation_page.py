"""The page about an evaluation of LoRAs: the recommendation, pictures step by step, measures, strengths.

Self-contained like the report of a run (`run_report`), without scripts: steps are radio buttons in a row, which arrow
keys change as they do a slider. Its input is plain data, which `runs.evaluate` collects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.core.printable import count_text
from lorasmith.report.curves import measure_figure
from lorasmith.report.markup import Html, definitions, document, section, table, tag
from lorasmith.report.pictures import PictureTable, picture, picture_table

_EDGE = 320  # pixels of the longer edge of a picture


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """A LoRA."""

    label: str
    step: int | None
    likeness: float | None
    adherence: float | None
    numbers: Mapping[str, float | None]  # further measures by name
    pictures: Sequence[Path]  # one for each prompt


@dataclass(frozen=True, kw_only=True)
class EvaluationPage:
    """Content of the page."""

    title: str
    sentence: str
    is_recommended: bool
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    base: Sequence[Path] = ()
    rows: Sequence[EvaluationRow] = ()
    best: int | None = None  # place of the recommended LoRA
    levels: Sequence[tuple[str, float]] = ()  # likeness to compare with, by what it is of
    strengths: PictureTable | None = None
    notes: Sequence[str] = ()


def evaluation_page(page: EvaluationPage) -> str:
    """The page. All text is escaped."""
    chosen = len(page.rows) - 1 if page.best is None else page.best
    return document(
        f"{page.title} · evaluation",
        tag(
            "header",
            tag("p", "Which step?", class_="kicker"),
            tag("h1", page.title),
            tag("p", page.summary, class_="summary"),
            tag("p", page.sentence, class_=f"verdict {'' if page.is_recommended else 'fair'}".strip()),
            definitions(page.facts, class_="facts"),
        ),
        section("Pictures", _chooser(page, chosen)),
        section("Likeness and adherence", *_curves(page)),
        section("By strength", page.strengths and picture_table(page.strengths)),
        section("In numbers", _numbers(page)),
        section("Notes", tag("ul", [tag("li", note) for note in page.notes]) if page.notes else None),
        rules=_rules(len(page.rows) + 1),
    )


def _chooser(page: EvaluationPage, chosen: int) -> Html:
    """Pictures of one LoRA, or of the base model, with a radio button for each."""
    shown = [("base model", page.base), *((row.label, row.pictures) for row in page.rows)]
    buttons = [
        tag(
            "input",
            type="radio",
            name="lora",
            id=f"lora-{place}",
            aria_label=label,
            checked="" if place == chosen + 1 else None,
        )
        for place, (label, _) in enumerate(shown)
    ]
    labels = [
        tag("label", f"{label} (recommended)" if place - 1 == page.best else label, for_=f"lora-{place}")
        for place, (label, _) in enumerate(shown)
    ]
    grids = [
        tag(
            "div",
            [
                tag("figure", picture(path, f"{prompt}, {label}", _EDGE), tag("figcaption", prompt))
                for prompt, path in zip(page.prompts, pictures, strict=True)
            ],
            class_=f"of of-{place} drawn",
        )
        for place, (label, pictures) in enumerate(shown)
    ]
    return tag("div", buttons, tag("div", labels, class_="track"), grids, class_="chooser")


def _rules(count: int) -> str:
    """Styles that show what the checked radio button is about."""
    return "".join(
        f"#lora-{place}:checked ~ .of-{place} {{ display: grid; }}\n"
        f"#lora-{place}:checked ~ .track label[for=lora-{place}] "
        "{ background: var(--accent); color: var(--card); border-color: var(--accent); }\n"
        f"#lora-{place}:focus-visible ~ .track label[for=lora-{place}] "
        "{ outline: 2px solid var(--accent); outline-offset: 2px; }\n"
        for place in range(count)
    )


def _curves(page: EvaluationPage) -> list[Html]:
    steps = [row.step for row in page.rows if row.step is not None]
    if len(steps) < 2 or len(set(steps)) < len(page.rows):
        return []
    says = (
        "Likeness is to the training pictures; adherence is 1 where all wishes are followed, and 0 where "
        "they are ignored."
    )
    best = None if page.best is None else steps[page.best]
    lines = [("likeness", [row.likeness for row in page.rows]), ("adherence", [row.adherence for row in page.rows])]
    label = f"Likeness and adherence of {count_text(len(page.rows), 'LoRA')}"
    if best is not None:
        label += f", step {best:,} is recommended"
    return [tag("p", says), measure_figure(steps, lines, levels=page.levels, best=best, label=label)]


def _numbers(page: EvaluationPage) -> Html:
    names = list(page.rows[0].numbers) if page.rows else []
    rows = [
        (
            f"{row.label} (recommended)" if place == page.best else row.label,
            *(_number(number) for number in (row.likeness, row.adherence, *row.numbers.values())),
        )
        for place, row in enumerate(page.rows)
    ]
    columns = ("LoRA", "Likeness", "Adherence", *(name.capitalize() for name in names))
    return table(columns, rows, label="Measures of each LoRA", numbers=range(1, len(columns)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
