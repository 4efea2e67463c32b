"""Advice on single images of a run, from the training losses of each: leave it out, draw it less, look at its caption.

What losses say of an image is decided in `training.storage.ledger`; this module chooses what is worth a user's while.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import geometric_mean, median

from lorasmith.core.printable import count_text
from lorasmith.report.run_report import UNJUDGED, Advice, ImageAdvice
from lorasmith.runs.run_images import images_in
from lorasmith.runs.run_log import LoggedRun
from lorasmith.runs.spec import RunSpec
from lorasmith.training.events import Validated
from lorasmith.training.storage.ledger import FAR, FEW_IMAGES, MIN_DRAWS, ImageLevels, QuantileCurve
from lorasmith.training.storage.records import RunRecord

_LEAST_FACTOR, _MOST_FACTOR = Fraction(1, 10), Fraction(1, 2)  # of how often a memorised image is drawn


def losses_by_image(run: LoggedRun) -> tuple[QuantileCurve | None, list[ImageLevels]]:
    """Loss by noise level, and records by image without those of the class; None and empty if the log has no draws."""
    view, ledger = run.view, run.log.ledger
    ledger.add(view.step + 1 if view.points else 0, ())  # leaves out what was rolled back at the end
    if not ledger:
        return None, []
    # Pictures of the class, which the model knows, are no measure of those of the subject.
    of_class = {image.name for image in images_in(run.record.data) if image.use == "class"}
    return ledger.curve(), ledger.images(without=of_class, held_out_fall=_fall(view.validations))


def advice_of(run: LoggedRun) -> Advice:
    """The advice on the images of a run."""
    return advice_on(run.record, losses_by_image(run)[1])


def advice_on(record: RunRecord, images: Sequence[ImageLevels]) -> Advice:
    """The advice on images with these losses; none where a method's loss is not that of a picture and its caption."""
    if not images or record.consequences.learns_no_subject:
        return Advice()
    judged = [image for image in images if image.standing != UNJUDGED]
    if len(judged) < FEW_IMAGES:
        most = max(image.draws for image in images)
        few = f"at least {FEW_IMAGES} images that were drawn {MIN_DRAWS} times each"
        there = f"got {len(judged)} of {len(images):,}, and the one drawn most was drawn {count_text(most, 'time')}"
        return Advice(summary=f"Advice on single images needs {few}, {there}.")
    never = [_never(image) for image in judged if image.standing == "never fit"]
    memorised = [image for image in judged if image.standing == "memorised"]
    found = [*never, *(_by_heart(image, judged, record) for image in memorised if image.stands_out)]
    sentences = [_summary(found)] if found else []
    if 2 * len(memorised) > len(judged):
        sentences.insert(0, f"{len(memorised):,} of {len(judged):,} images are learnt by heart: train for fewer steps.")
    return Advice(tuple(found), " ".join(sentences) or f"None of {len(judged):,} images stands out by its losses.")


def _never(image: ImageLevels) -> ImageAdvice:
    return ImageAdvice(
        image.name,
        "never learnt",
        f"Its loss stays {image.relative:.1f} times that of the others at the same noise levels.",
        "Look at its caption, or leave it out if it does not belong here.",
    )


def _by_heart(image: ImageLevels, judged: Sequence[ImageLevels], record: RunRecord) -> ImageAdvice:
    usual = median(other.draws for other in judged if other is not image)
    below = f"Its loss fell to {image.relative:.0%} of that of the others at the same noise levels"
    often = image.draws / usual
    seen = f", and it was drawn {often:.0f} times as often" if often >= FAR else ""
    return ImageAdvice(
        image.name,
        "learnt by heart",
        f"{below}{seen}.".replace("%", " %"),
        "Draw it less often, or leave it out.",
        _drawn_less(image.name, Fraction(round(usual), image.draws), record),
    )


def _drawn_less(name: str, factor: Fraction, record: RunRecord) -> str:
    """The rule of `image_repeats` that draws an image less often; empty for a run that was not on a folder."""
    try:
        before = RunSpec.from_record(record.source, {}).data.repeat_factor(name)
    except ValueError:
        return ""
    wanted = before * max(_LEAST_FACTOR, min(_MOST_FACTOR, factor))
    pattern = glob.escape(name).replace("|", "?")  # which separates rules
    return f"{pattern}={max(0.01, math.floor(100 * wanted) / 100):g}"


def _summary(found: Sequence[ImageAdvice]) -> str:
    """A line on the first images, each with its remedy if these are all."""
    if len(found) <= _NAMED:
        return " ".join(
            f"{advice.name} is {advice.finding}: {advice.remedy[0].lower()}{advice.remedy[1:]}" for advice in found
        )
    parts = [f"{advice.name} is {advice.finding}" for advice in found[:_NAMED]]
    return f"{', '.join(parts)}, and {len(found) - _NAMED:,} more stand out. The report has all."


_NAMED = 3


def _fall(validations: Sequence[Validated]) -> float | None:
    """Held-out loss late in the run divided by that early; None below three validations."""
    losses = [validation.loss for validation in validations if validation.loss > 0 and math.isfinite(validation.loss)]
    third = len(losses) // 3
    return geometric_mean(losses[-third:]) / geometric_mean(losses[:third]) if third else None
