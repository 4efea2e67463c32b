"""The page about a sweep: its runs ranked, their held-out losses in one figure, and their pictures side by side.

Self-contained like the report of a run (`run_report`), to which it links. Its input is plain data, which
`runs.sweep_results` collects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorasmith.report.curves import comparison_figure
from lorasmith.report.markup import Html, document, section, table, tag
from lorasmith.report.pictures import PictureTable, picture_table
from lorasmith.report.run_report import change, number, plain

_MOODS = {"failed": "bad", "stopped": "fair", "complete": "fair", "running": "good", "waiting": "fair"}


@dataclass(frozen=True, kw_only=True)
class RankedRun:
    """A complete run."""

    name: str  # of its folder
    settings: Sequence[object]  # values of `SweepReport.varied`
    loss: float  # the lowest held-out loss
    base_loss: float  # of the same images without the LoRA; NaN if unknown
    best_step: int
    time: str  # of training, as text
    lora: str  # path
    link: str | None = None  # to its report
    validations: Sequence[tuple[int, float]] = ()  # step and loss


@dataclass(frozen=True)
class UnrankedRun:
    """A run that is not ranked: its state in a word, its number of steps, and the error of a failed one."""

    name: str
    state: str
    steps: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Content of the page."""

    title: str
    summary: str  # its file and the states of its runs, in a line
    verdict: str  # the best run, in a sentence
    comparable: bool = True  # all runs have the same held-out images
    varied: Sequence[str] = ()  # names of the settings that differ
    ranked: Sequence[RankedRun] = ()  # complete runs, the best first
    unranked: Sequence[UnrankedRun] = ()  # all others
    pictures: PictureTable | None = None  # of the runs, side by side
    # pictures by name of the run, if the runs show different things
    sheets: Sequence[tuple[str, PictureTable]] = field(default=())


def sweep_report(report: SweepReport) -> str:
    """The page. All text in `report` is escaped."""
    return document(
        f"{report.title} · sweep",
        tag(
            "header",
            tag("p", "Sweep", class_="kicker"),
            tag("h1", report.title),
            tag("p", report.summary, class_="summary"),
            tag("p", report.verdict, class_="verdict"),
        ),
        section("Pictures", *_pictures(report)),
        section("Ranking", *_ranking(report)),
        section("Held-out loss", *_curves(report.ranked)),
        section("Failed and unfinished", _unranked(report.unranked)),
    )


def _ranking(report: SweepReport) -> list[Html]:
    if not report.ranked:
        return []
    explained = (
        "By the lowest loss of the held-out images, which are the same for all runs and judged with the same noise."
        if report.comparable
        else "By the change against the base model: the runs were judged by different held-out images, captions or "
        "sizes, so their losses cannot be compared directly."
    )
    rows = [
        (
            tag("a", run.name, href=run.link) if run.link else run.name,
            *map(plain, run.settings),
            number(run.loss),
            change(run.loss, run.base_loss),
            f"{run.best_step:,}",
            run.time,
            tag("span", run.lora, class_="name"),
        )
        for run in report.ranked
    ]
    columns = ("Run", *report.varied, "Held-out loss", "Against the base", "Best step", "Time", "LoRA")
    first = 1 + len(report.varied)
    return [tag("p", explained), table(columns, rows, label="Runs, the best first", numbers=range(first, first + 4))]


def _curves(ranked: Sequence[RankedRun]) -> list[Html]:
    curves = [
        (run.name, [(step, 100 * (loss / run.base_loss - 1)) for step, loss in run.validations])
        for run in ranked
        if run.base_loss > 0 and run.validations
    ]
    if not curves:
        return []
    explained = "Against the base model: below 0 is better than without a LoRA, and a curve that rises is overfitting."
    label = f"Held-out loss over the steps of {len(curves):,} runs, relative to the base model"
    return [tag("p", explained), comparison_figure(curves, label=label)]


def _pictures(report: SweepReport) -> list[Html]:
    columns = [tag("div", tag("h3", name), picture_table(sheet)) for name, sheet in report.sheets]
    return [*([] if report.pictures is None else [picture_table(report.pictures)]), *columns]


def _unranked(runs: Sequence[UnrankedRun]) -> Html | None:
    if not runs:
        return None
    rows = []
    for run in runs:
        unmeasured = "no held-out loss was measured" if run.state == "complete" else ""
        state = tag("span", run.state, class_=_MOODS.get(run.state))
        rows.append((run.name, state, f"{run.steps:,}", run.error or unmeasured))
    return table(("Run", "State", "Steps", "Error"), rows, label="Runs that are not ranked", wordy=True)
