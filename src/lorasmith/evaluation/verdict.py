"""Which of several LoRAs is good: measures of what each of them draws, and a recommendation with its reason.

All pictures are compared by features (`recognition`), rows of length 1, with those that the base model draws of the
same prompts and noise. Adherence is the probability by which each wish, such as `on a beach`, is recognised in its
picture.
Image features know no text: by them, a wish is recognised among all by the direction in which it changes features and
colours of the base model's picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.evaluation import measures
from lorasmith.evaluation.evaluation_record import Measures, Training, Verdict
from lorasmith.evaluation.recognition import WishScores

LEAST_SELF_LIKENESS = 0.59
"""Of the training pictures with which the recommendation was validated (`benchmarks.quality.choice`), the least mean
cosine of two of them; those of pictures that differ more are not compared."""

_UNCHANGED = 1e-3  # distance of pictures that are the same but for rounding
_LEARNT = 0.05  # share of the way from the base model's likeness to that of the training pictures to one another
_IGNORED = 0.5  # share of the recommended LoRA's adherence, below which prompts are ignored
_COPIED = 0.05  # cosine by which drawn pictures are nearer to a training picture than those to one another


@dataclass(frozen=True)
class Drawn:
    """Features of the pictures of one LoRA, or of the base model without one."""

    plain: Tensor  # (noises, features), the trigger alone
    wishes: WishScores
    others: Tensor  # (prompts, features), without the trigger
    of_class: Tensor  # (0 or 1, features), the class word alone


def training_facts(pictures: Tensor | None, base: Drawn) -> Training:
    """The facts of the training pictures, (N, features); None where there are none."""
    if pictures is None:
        return Training(count=0, self_likeness=None, base_likeness=None)
    return Training(
        count=len(pictures),
        self_likeness=measures.self_likeness(pictures),
        base_likeness=measures.likeness(_of_trigger(base), pictures),
    )


def measured(drawn: Drawn, base: Drawn, pictures: Tensor | None) -> Measures:
    """The measures of a LoRA; `pictures` are the features of the training pictures, (N, features)."""
    copies = None
    if pictures is not None and len(pictures) > 1:
        copies = measures.nearest(drawn.plain, pictures) - _nearest_other(pictures)
    return Measures(
        likeness=None if pictures is None else measures.likeness(_of_trigger(drawn), pictures),
        adherence=drawn.wishes.adherence(base.wishes),
        diversity=measures.diversity(drawn.plain),
        memorisation=copies,
        drift=measures.drift(base.others, drawn.others) if len(base.others) else None,
        bleed=measures.drift(base.of_class, drawn.of_class) if len(base.of_class) else None,
        change=measures.drift(base.plain, drawn.plain),
    )


def scores(found: Sequence[Measures], training: Training) -> list[float]:
    """What the recommendation maximises, for each LoRA: likeness times adherence.

    Likeness counts from that of the base model to that of the training pictures to one another.
    """
    return [
        _learnt(measures, training) * (1.0 if measures.adherence is None else measures.adherence) for measures in found
    ]


def verdict(measured: Sequence[Measures], training: Training) -> Verdict:
    """Which of the LoRAs to use, in the order of their training."""
    if all(measures.change < _UNCHANGED for measures in measured):
        return Verdict(outcome="changes nothing")
    if training.count == 0:
        return Verdict(outcome="no pictures")
    if training.self_likeness is None or training.self_likeness < LEAST_SELF_LIKENESS:
        return Verdict(outcome="not comparable")
    if max(_learnt(measures, training) for measures in measured) < _LEARNT:
        return Verdict(outcome="nothing learnt")
    values = scores(measured, training)
    best = max(range(len(measured)), key=values.__getitem__)
    if values[best] == 0:  # what has learnt something follows no prompt
        return Verdict(outcome="ignores prompts")
    follows = measured[best].adherence
    ignored = None
    if follows is not None:
        below = [
            place for place in range(best + 1, len(measured)) if (measured[place].adherence or 0) < _IGNORED * follows
        ]
        ignored = next((place for place in below if all(later in below for later in range(place, len(measured)))), None)
    copies = measured[best].memorisation
    return Verdict(outcome="use", best=best, ignored_from=ignored, copied=copies is not None and copies > _COPIED)


def _learnt(found: Measures, training: Training) -> float:
    """Share of the way from the base model's likeness to that of the training pictures to one another, 0 to 1."""
    likeness, base, own = found.likeness, training.base_likeness, training.self_likeness
    if likeness is None or base is None or own is None:
        return 0.0
    return measures.learnt(likeness, base, own)


def _of_trigger(drawn: Drawn) -> Tensor:
    """All pictures with the trigger."""
    return torch.cat((drawn.plain, drawn.wishes.features.flatten(0, 1)))


def _nearest_other(pictures: Tensor) -> float:
    """Mean cosine of each picture with the one that is most alike."""
    alike = pictures @ pictures.T
    return float(alike.masked_fill(torch.eye(len(pictures), dtype=torch.bool), -1).amax(1).mean())
