"""The report of a run: one HTML page with losses, pictures, settings, and commands to repeat the run.

The page is self-contained: no scripts, no network, embedded pictures and curves. Its input is plain data, which
`runs.run_page` collects from the folder of a run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

from lorasmith.core.printable import count_text
from lorasmith.report.curves import Curves, QuantileLosses, loss_figure, measure_figure, quantile_figure
from lorasmith.report.markup import Html, command, definitions, document, folded, section, table, tag
from lorasmith.report.pictures import PictureTable, picture, picture_table

STANDINGS = ("never fit", "memorised")  # of images that need attention, worst first

UNJUDGED = "too few draws"  # standing of an image that cannot be judged

_IMAGES_SHOWN = 20
_SHOTS = 24  # images that are shown unfolded
_SHOT_EDGE = 384  # of their pictures, with the controls beside, in pixels


class ImageRecord(Protocol):
    """Training losses of one image; levels are losses relative to the average at the same noise levels.

    `draws` is its number of draws. `first` and `last` are levels early and late in the run, relative to all images
    early; `relative` is the late one relative to all images then. `standing` is an interpretation in a word or two.
    """

    @property
    def name(self) -> str: ...
    @property
    def draws(self) -> int: ...
    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    @property
    def relative(self) -> float: ...
    @property
    def standing(self) -> str: ...


@dataclass(frozen=True)
class ImageAdvice:
    """What to do about an image of a run."""

    name: str
    finding: Literal["never learnt", "learnt by heart"]
    reason: str  # a sentence with numbers
    remedy: str  # a sentence
    drawn_less: str = ""  # rule of the setting `image_repeats` that draws it less often; empty where that is no remedy


@dataclass(frozen=True)
class Advice:
    """What to do about single images of a run, the most important first."""

    images: tuple[ImageAdvice, ...] = ()
    summary: str = ""  # in a line, also why there is none; empty for runs whose losses say nothing of single images


@dataclass(frozen=True)
class Setting:
    """One setting of the run."""

    name: str
    value: object
    default: object = None  # None is resolved by the run
    help: str = ""
    group: str = ""  # heading


@dataclass(frozen=True)
class ValidationRow:
    """A validation after `step` updates."""

    step: int
    loss: float
    base_loss: float  # without the LoRA
    low: float  # of the 95 % confidence interval of loss − base_loss, as is `high`
    high: float


@dataclass(frozen=True)
class TrainedImage:
    """An image of the run."""

    name: str
    caption: str
    marks: tuple[str, ...] = ()  # special properties, in a word or two each
    picture: Path | None = None  # a small version


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Content of the page."""

    title: str
    status: str  # how the run ended, in a word or two
    mood: str  # `good`, `fair` or `bad`, for the colour of the status
    verdict: str  # interpretation, in a sentence
    summary: str  # algorithm, model, date and device, in a line
    facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # paths of results
    commands: Mapping[str, str] = field(default_factory=dict)  # command line by purpose
    curves: Curves = field(default_factory=lambda: Curves(losses=()))
    validations: Sequence[ValidationRow] = ()
    quantiles: QuantileLosses | None = None  # training loss by noise level
    before_after: PictureTable | None = None  # base model and finished LoRA
    progress: PictureTable | None = None  # previews over the steps
    images: Sequence[ImageRecord] = ()  # losses of the training images
    advice: Advice = field(default_factory=Advice)
    trained_on: Sequence[TrainedImage] = ()
    left_out: Sequence[tuple[str, str]] = ()  # name and reason of each file that was not used
    evaluation: tuple[str, str] | None = None  # which LoRA is recommended and why, and the address of its page
    use: Mapping[str, str] = field(default_factory=dict)  # facts for using the LoRA
    programs: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by program, an instruction and text to copy
    settings: Sequence[Setting] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    captions: Sequence[tuple[str, str]] = ()  # name and caption of every sample
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[tuple[str, str, int | None]] = ()  # kind, sentence, and the step if it belongs to one


def run_report(report: RunReport) -> str:
    """The page. All text in `report` is escaped."""
    return document(
        f"{report.title} · training report",
        _header(report),
        section("Before and after", report.before_after and picture_table(report.before_after)),
        section("Previews during training", report.progress and picture_table(report.progress)),
        _said(report),
        section("Which step?", *_evaluation(report)),
        section("In numbers", definitions(report.facts, class_="facts")),
        section("Use it", *_use(report)),
        section("Loss", *_loss(report)),
        section("Loss by noise level", *_quantiles(report.quantiles)),
        section("Likeness of previews", *_likeness(report.curves)),
        section("Trained on", *_trained_on(report)),
        section("Training images", *_images(report.images, report.advice)),
        section("Notes", _notes(report.notes), id="notes"),
        section("Settings", *_settings(report.settings)),
        section("Data", definitions(report.data), None if report.trained_on else _captions(report.captions)),
        section("Environment", definitions(report.environment)),
        section("The LoRA", definitions(report.files), [command(line, what) for what, line in report.commands.items()]),
    )


def number(value: float) -> str:
    """A number with four significant digits, or a dash if it is not finite."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def change(value: float, base: float) -> str:
    """The signed change of a value relative to another in percent; a dash if unknown."""
    if not (math.isfinite(value) and base > 0):
        return "–"
    return f"{100 * (value / base - 1):+.1f} %".replace("-", "−")


def plain(value: object) -> str:
    """A value as on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _header(report: RunReport) -> Html:
    return tag(
        "header",
        tag("p", "Training report", class_="kicker"),
        tag("h1", report.title),
        tag("p", tag("span", report.status, class_=f"status {report.mood}"), " ", report.summary, class_="summary"),
    )


def _said(report: RunReport) -> Html:
    """The verdict, below the pictures that it is held against, and what happened."""
    counts = {kind: len(list(notes)) for kind, notes in groupby(sorted(kind for kind, _, _ in report.notes))}
    happened = ", ".join(f"{kind.lower()} × {count}" for kind, count in counts.items())
    return tag(
        "section",
        tag("p", report.verdict, class_="verdict"),
        tag("p", tag("a", "Notes", href="#notes"), f": {happened}", class_="summary") if happened else None,
    )


def _loss(report: RunReport) -> list[Html]:
    curves = report.curves
    if not any(map(math.isfinite, curves.losses)):
        return [tag("p", "No step was completed, so there is no loss to show.")]
    rates = {rate for rate in curves.rates if math.isfinite(rate)}
    says = ["Steps have different noise levels and images, so single losses vary; the line of means shows the trend."]
    if curves.validations:
        says.append(
            "Held-out images are never trained on and always evaluated with the same noise: if their loss rises while "
            "the training loss falls, the LoRA is overfitting. The star marks the lowest one."
        )
    if len(rates) == 1 and rates != {0.0}:
        says.append(f"The learning rate was {number(rates.pop())} throughout.")
    label = f"Training loss over {count_text(curves.every * len(curves.losses), 'step')}"
    if curves.validations:
        step, loss = min(curves.validations, key=lambda validation: validation[1])
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
            change(row.loss, row.base_loss),
            f"{change(row.base_loss + row.low, row.base_loss)} to {change(row.base_loss + row.high, row.base_loss)}",
        )
        for row in rows
    ]
    columns = ("Step", "Held-out loss", "Relative to the base model", "95 % interval")
    label = "Loss of the held-out images"
    return folded(f"{label}, in numbers", table(columns, cells, label=label, numbers=(1, 2, 3)))


def _quantiles(curve: QuantileLosses | None) -> list[Html]:
    if curve is None or len(curve.steps) < 2 or all(loss is None for losses in curve.losses for loss in losses):
        return []
    says = (
        "Fine detail is learnt at the clean end (0 %), composition at the noisy one (100 %). Losses of different noise "
        "levels are not comparable; the relevant information is which lines fall."
    )
    return [tag("p", says), quantile_figure(curve)]


def _likeness(curves: Curves) -> list[Html]:
    if len(curves.likenesses) < 2:
        return []
    says = (
        "Mean cosine of image features of previews with those of the training images: 1 is equal. Prompts are followed "
        "like by the base model at 1, and not at all at 0."
        if any(adherence is not None for _, _, adherence in curves.likenesses)
        else "Mean cosine of image features of previews with those of the training images: 1 is equal."
    )
    label = f"Likeness of previews to the training images, {curves.likenesses[-1][1]:.2f} at last"
    steps, likenesses, adherences = zip(*curves.likenesses, strict=True)
    lines = [("likeness of previews", likenesses), ("prompts followed", adherences)]
    levels = [] if curves.own_likeness is None else [("of the images to one another", curves.own_likeness)]
    return [tag("p", says), measure_figure(steps, lines, levels=levels, label=label)]


def _images(images: Sequence[ImageRecord], advice: Advice) -> list[Html]:
    if not images:
        return []
    rank = {standing: index for index, standing in enumerate(STANDINGS)}
    ordered = sorted(
        images, key=lambda image: (rank.get(image.standing, len(rank)), -_finite(image.relative), image.name)
    )
    odd = [image for image in ordered if image.standing in rank]
    shown = max(len(odd), min(len(ordered), _IMAGES_SHOWN))
    rules = " | ".join(filter(None, (image.drawn_less for image in advice.images)))
    says = "Levels are losses relative to the median of all images at the same noise levels at first."
    listed = [
        tag("li", tag("b", image.name), f" is {image.finding}. {image.reason} {image.remedy}")
        for image in advice.images
    ]
    parts = [
        tag("ul", listed) if listed else tag("p", advice.summary) if advice.summary else Html(""),
        *([tag("p", "To draw less: ", tag("code", f"--image-repeats {shlex.quote(rules)}"))] if rules else []),
        tag("p", says),
        _image_table(ordered[:shown]),
    ]
    if rest := ordered[shown:]:
        parts.append(folded(f"{len(rest):,} more images", _image_table(rest)))
    return parts


def _evaluation(report: RunReport) -> list[Html]:
    if report.evaluation is None:
        return []
    sentence, address = report.evaluation
    return [tag("p", sentence), tag("p", tag("a", "Pictures and measures of each step", href=address))]


def _use(report: RunReport) -> list[Html]:
    if not report.use:
        return []
    programs = [
        tag("div", tag("h3", name), tag("p", what), tag("pre", tag("code", text), tabindex=0), class_="program")
        for name, (what, text) in report.programs.items()
    ]
    return [definitions(report.use), *programs]


def _trained_on(report: RunReport) -> list[Html]:
    shots = [_shot(photo) for photo in report.trained_on]
    parts = [tag("div", shots[:_SHOTS], class_="shots")] if shots else []
    if rest := shots[_SHOTS:]:
        parts.append(folded(f"{len(rest):,} more images", tag("div", rest, class_="shots")))
    if report.left_out:
        label = f"{len(report.left_out):,} left out"
        parts.append(folded(label, table(("File", "Reason"), report.left_out, label=label, wordy=True)))
    return parts


def _shot(image: TrainedImage) -> Html:
    marks = tag("ul", [tag("li", mark) for mark in image.marks], class_="marks") if image.marks else None
    return tag(
        "figure",
        tag("div", picture(image.picture, image.name, _SHOT_EDGE), marks, class_="frame"),
        tag(
            "figcaption",
            tag("b", image.name),
            tag("span", image.caption or tag("i", "no caption"), class_="said", title=image.caption or None),
        ),
        class_="shot",
    )


def _image_table(images: Sequence[ImageRecord]) -> Html:
    rows = [
        (
            tag("span", image.name, class_="name"),
            tag("span", image.standing, class_="odd") if image.standing in STANDINGS else image.standing,
            f"{image.draws:,}",
            *(f"{level:.2f}" if math.isfinite(level) else "–" for level in (image.first, image.last, image.relative)),
        )
        for image in images
    ]
    columns = ("Image", "Standing", "Draws", "Early level", "Late level", "Late, relative to all")
    return table(columns, rows, label="Training images", numbers=(2, 3, 4, 5))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _settings(settings: Sequence[Setting]) -> list[Html]:
    changed = [setting for setting in settings if setting.value != setting.default]
    same = [setting for setting in settings if setting.value == setting.default]
    parts = []
    if changed:
        rows = [(setting.name, plain(setting.value), plain(setting.default), setting.help) for setting in changed]
        parts.append(
            table(
                ("Setting", "Value", "Default", "Meaning"), rows, label="Settings that are not the default", wordy=True
            )
        )
    if same:
        kept = [(setting.name, plain(setting.value), setting.help) for setting in same]
        whole = table(("Setting", "Value", "Meaning"), kept, label="Settings at their default", wordy=True)
        parts.append(folded(f"{len(same)} settings at their default", whole))
    return parts


def _captions(captions: Sequence[tuple[str, str]]) -> Html:
    if not captions:
        return Html("")
    return folded(
        count_text(len(captions), "caption"), table(("Image", "Caption"), captions, label="Captions", wordy=True)
    )


def _notes(notes: Sequence[tuple[str, str, int | None]]) -> Html:
    if not notes:
        return Html("")
    said = [
        tag("li", tag("b", kind), f" at step {step:,}" if step is not None else "", f": {sentence}")
        for kind, sentence, step in notes
    ]
    return tag("ul", said)
