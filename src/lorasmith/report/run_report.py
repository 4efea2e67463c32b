"""The report of a run: one HTML page that says how it went, what came out, and how to do it again.

The page needs nothing besides itself: no script, no network, pictures and curves lie in it. It is given plain data;
whoever knows the folder of a run collects that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from lorasmith.report.curves import Curves, QuantileCurve, loss_figure, quantile_figure
from lorasmith.report.markup import Html, command, definitions, document, folded, section, table, tag
from lorasmith.report.pictures import PictureTable, picture_table

__all__ = ["ImageRecord", "Note", "RunReport", "Setting", "ValidationRow", "run_report"]

STANDINGS = ("never fit", "memorised")
"""What an image can be called that somebody should look at, worst first; every other standing is fine."""

UNJUDGED = "too few looks"
"""What an image is called of which nothing can be said."""

_IMAGES_SHOWN = 20


class ImageRecord(Protocol):
    """How training went on one image.

    Levels are losses over what is usual at the same noise levels.

    Attributes:
        name: of the image.
        looks: how often it was trained on.
        first, last: its level early and late, 1 being what all images had early in the run.
        relative: its level late in the run as a share of that of all images then.
        standing: what to make of it, in a word or two.
    """

    @property
    def name(self) -> str: ...
    @property
    def looks(self) -> int: ...
    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    @property
    def relative(self) -> float: ...
    @property
    def standing(self) -> str: ...


@dataclass(frozen=True)
class Setting:
    """One setting of the run.

    Attributes:
        name: as on the command line.
        value: that it had.
        default: that it has when nothing is said; None is decided by the run.
        help: what it means.
        group: heading.
    """

    name: str
    value: object
    default: object = None
    help: str = ""
    group: str = ""


@dataclass(frozen=True)
class ValidationRow:
    """One look at the held-out images.

    Attributes:
        step: updates taken.
        loss, base_loss: with and without the LoRA.
        low, high: 95 % confidence interval of loss − base_loss.
    """

    step: int
    loss: float
    base_loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Note:
    """Something that happened, in a sentence; `step` is None where it belongs to none."""

    kind: str
    message: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What the page tells.

    Attributes:
        title: name of the run.
        status: how it ended, in a word or two.
        mood: `good`, `fair` or `bad`, for the colour of the status.
        verdict: what to make of the run, in a sentence.
        summary: what was done, in a line.
        facts: the most important numbers.
        files: what came out, with where it is.
        commands: purpose and command line.
        curves: losses and the like.
        validations: the looks at the held-out images.
        quantiles: training loss by noise level.
        before_after: base model and finished LoRA.
        progress: the same pictures as training went on.
        images: the training images.
        settings: all settings.
        captions: name and caption of every sample.
        data, environment: names and values.
        notes: what happened on the way.
    """

    title: str
    status: str
    mood: str
    verdict: str
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    curves: Curves = field(default_factory=lambda: Curves(losses=()))
    validations: Sequence[ValidationRow] = ()
    quantiles: QuantileCurve | None = None
    before_after: PictureTable | None = None
    progress: PictureTable | None = None
    images: Sequence[ImageRecord] = ()
    settings: Sequence[Setting] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    captions: Sequence[tuple[str, str]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[Note] = ()


def run_report(report: RunReport) -> str:
    """The page. All text in `report` is shown as it is, whatever markup it looks like."""
    return document(
        f"{report.title} · training report",
        _header(report),
        section("The LoRA", definitions(report.files), [command(line, what) for what, line in report.commands.items()]),
        section("Before and after", report.before_after and picture_table(report.before_after)),
        section("Loss", *_loss(report)),
        section("Loss by noise level", *_quantiles(report.quantiles)),
        section("As training went on", report.progress and picture_table(report.progress)),
        section("Training images", *_images(report.images)),
        section("What happened", _notes(report.notes), id="notes"),
        section("Settings", *_settings(report.settings)),
        section("Data", definitions(report.data), _captions(report.captions)),
        section("Made with", definitions(report.environment)),
    )


def number(value: float) -> str:
    """A loss or the like as people read it: four significant digits, or a dash where there is none."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _header(report: RunReport) -> Html:
    counts = {kind: len(list(notes)) for kind, notes in groupby(sorted(note.kind for note in report.notes))}
    happened = ", ".join(f"{kind.lower()} × {count}" for kind, count in counts.items())
    return tag(
        "header",
        tag("p", "Training report", class_="kicker"),
        tag("h1", report.title),
        tag("p", tag("span", report.status, class_=f"status {report.mood}"), " ", report.summary, class_="summary"),
        tag("p", report.verdict, class_="verdict"),
        definitions(report.facts, class_="facts"),
        tag("p", tag("a", "What happened", href="#notes"), f": {happened}", class_="summary") if happened else None,
    )


def _loss(report: RunReport) -> list[Html]:
    curves = report.curves
    if not any(map(math.isfinite, curves.losses)):
        return [tag("p", "No step came to its end, so there is no loss to show.")]
    rates = {rate for rate in curves.rates if math.isfinite(rate)}
    says = [
        "Each step is measured at other noise levels and on other images, so that single steps jump; the smoothed line "
        "shows where it is going."
    ]
    if curves.validations:
        says.append(
            "Held-out images are never trained on and always looked at in the same way: when their loss rises while "
            "the training loss falls, the LoRA is learning its images by heart. The star is the best of them."
        )
    if len(rates) == 1 and rates != {0.0}:
        says.append(f"The learning rate was {number(rates.pop())} throughout.")
    label = f"Training loss over {len(curves.losses):,} steps"
    if curves.validations:
        step, loss = min(curves.validations, key=lambda one: one[1])
        label += f", and loss of the held-out images, which is lowest at step {step:,} with {number(loss)}"
    return [tag("p", " ".join(says)), loss_figure(curves, label=label), _validations(report.validations)]


def _validations(rows: Sequence[ValidationRow]) -> Html:
    if not rows:
        return Html("")
    best = min(rows, key=lambda row: row.loss if math.isfinite(row.loss) else math.inf)
    cells = [
        (
            f"{row.step:,}{' (best)' if row is best else ''}",
            number(row.loss),
            _change(row.loss, row.base_loss),
            f"{_change(row.base_loss + row.low, row.base_loss)} to {_change(row.base_loss + row.high, row.base_loss)}",
        )
        for row in rows
    ]
    columns = ("Step", "Held-out loss", "Against the base model", "95 % interval")
    label = "Loss of the held-out images"
    return folded(f"{label}, in numbers", table(columns, cells, label=label, numbers=(1, 2, 3)))


def _change(value: float, base: float) -> str:
    if not (math.isfinite(value) and base > 0):
        return "–"
    return f"{100 * (value / base - 1):+.1f} %".replace("-", "−")


def _quantiles(curve: QuantileCurve | None) -> list[Html]:
    if curve is None or len(curve.steps) < 2 or all(loss is None for losses in curve.losses for loss in losses):
        return []
    says = (
        "Fine detail is learnt at the clean end (0 %), composition at the noisy one (100 %). The levels differ by "
        "nature; what counts is which of the lines fall."
    )
    return [
        tag("p", says),
        quantile_figure(curve, label="Training loss over the steps, for each range of noise levels"),
    ]


def _images(images: Sequence[ImageRecord]) -> list[Html]:
    if not images:
        return []
    rank = {standing: index for index, standing in enumerate(STANDINGS)}
    ordered = sorted(images, key=lambda one: (rank.get(one.standing, len(rank)), -_finite(one.relative), one.name))
    odd = [image for image in ordered if image.standing in rank]
    shown = max(len(odd), min(len(ordered), _IMAGES_SHOWN))
    says = (
        f"{_standings(ordered)} An image that is never fit often has a wrong caption or does not belong; one "
        "that is memorised is drawn too often. Levels are losses over what is usual at the same noise levels: 1 is "
        "what all images had at first."
    )
    parts = [tag("p", says), _image_table(ordered[:shown])]
    if rest := ordered[shown:]:
        parts.append(folded(f"{len(rest):,} more images", _image_table(rest)))
    return parts


def _standings(images: Sequence[ImageRecord]) -> str:
    if all(image.standing == UNJUDGED for image in images):
        return "No image was looked at often enough to judge it."
    counts = {word: sum(image.standing == word for image in images) for word in STANDINGS}
    found = " and ".join(f"{count:,} {'is' if count == 1 else 'are'} {word}" for word, count in counts.items() if count)
    return f"Of {len(images):,} images, {found}." if found else f"None of the {len(images):,} images stands out."


def _image_table(images: Sequence[ImageRecord]) -> Html:
    rows = [
        (
            tag("span", one.name, class_="name"),
            tag("span", one.standing, class_="odd") if one.standing in STANDINGS else one.standing,
            f"{one.looks:,}",
            *(f"{level:.2f}" if math.isfinite(level) else "–" for level in (one.first, one.last, one.relative)),
        )
        for one in images
    ]
    columns = ("Image", "Standing", "Looks", "Early level", "Late level", "Late, against all")
    return table(columns, rows, label="Training images", numbers=(2, 3, 4, 5))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _settings(settings: Sequence[Setting]) -> list[Html]:
    changed = [one for one in settings if one.value != one.default]
    same = [one for one in settings if one.value == one.default]
    parts = []
    if changed:
        rows = [
            (
                one.name,
                _plain(one.value),
                _plain(one.default),
                one.help,
            )
            for one in changed
        ]
        parts.append(
            table(
                ("Setting", "Value", "Default", "Meaning"), rows, label="Settings that are not the default", wordy=True
            )
        )
    if same:
        kept = [(one.name, _plain(one.value), one.help) for one in same]
        whole = table(("Setting", "Value", "Meaning"), kept, label="Settings at their default", wordy=True)
        parts.append(folded(f"{len(same)} settings at their default", whole))
    return parts


def _captions(captions: Sequence[tuple[str, str]]) -> Html:
    if not captions:
        return Html("")
    return folded(f"{len(captions):,} captions", table(("Image", "Caption"), captions, label="Captions", wordy=True))


def _plain(value: object) -> str:
    """A value as it is given on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "left out"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _notes(notes: Sequence[Note]) -> Html:
    if not notes:
        return Html("")
    said = [
        tag("li", tag("b", note.kind), f" at step {note.step:,}" if note.step is not None else "", f": {note.message}")
        for note in notes
    ]
    return tag("ul", said)
