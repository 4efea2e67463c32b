"""Which of several LoRAs is good: measures of what each of them draws, and a recommendation with its reason.

All pictures are compared by features (`likeness`), rows of length 1, with those that the base model draws of the same
prompts and noise. Adherence is measured without a judge: a wish, such as `on a beach`, changes the features of the base
model's picture, and those of a LoRA that still follows prompts change in the same direction. From both the mean over
the wishes is taken, so that only what tells wishes apart counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.evaluation import measures

LEAST_SELF_LIKENESS = 0.59
"""Of the training pictures with which the recommendation was validated (`benchmarks.quality.choice`), the least mean
cosine of two of them; those of pictures that differ more are not compared."""

_UNCHANGED = 1e-3  # distance of pictures that are the same but for rounding
_LEARNT = 0.1  # share of the way from the base model's likeness to that of the training pictures to one another
_IGNORED = 0.5  # of the base-relative adherence of the recommended LoRA, below which prompts are ignored
_COPIED = 0.05  # cosine by which drawn pictures are nearer to a training picture than those to one another

Outcome = Literal["use", "no pictures", "not comparable", "changes nothing", "nothing learnt", "ignores prompts"]


@dataclass(frozen=True)
class Drawn:
    """Features of the pictures of one LoRA, or of the base model without one."""

    plain: Tensor  # (seeds, features), the trigger alone
    asked: Tensor  # (wishes, features), the trigger with a wish each, of the first seed
    others: Tensor  # (prompts, features), without the trigger
    of_class: Tensor  # (0 or 1, features), the class word alone


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What the pictures of a LoRA show. Null is what could not be measured."""

    likeness: Annotated[float | None, "mean cosine of the pictures of the trigger with the training pictures"]
    adherence: Annotated[float | None, "how well prompts are followed: 1 as by the base model, 0 not at all"]
    diversity: Annotated[float | None, "mean distance of two pictures of the trigger"]
    memorisation: Annotated[
        float | None, "how much nearer a training picture is than the nearest other one of a training picture"
    ]
    drift: Annotated[float | None, "mean distance of pictures without the trigger from the base model's"]
    bleed: Annotated[float | None, "distance of the picture of the class from the base model's"]
    change: Annotated[float, "mean distance of pictures of the trigger from the base model's"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of the training pictures."""

    count: int
    self_likeness: Annotated[float | None, "mean cosine of two of them; null for fewer than two"]
    base_likeness: Annotated[float | None, "of what the base model draws for the trigger"]

    @property
    def is_comparable(self) -> bool:
        """Whether the measure was validated on pictures that are as alike."""
        return self.self_likeness is not None and self.self_likeness >= LEAST_SELF_LIKENESS


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which LoRA to use."""

    outcome: Outcome
    best: Annotated[int | None, "place of the recommended one, from 0; null if none is"] = None
    ignored_from: Annotated[int | None, "place of the first one after it, from which on prompts are ignored"] = None
    copied: Annotated[bool, "whether the recommended one draws copies of training pictures"] = False


def training_facts(pictures: Tensor | None, base: Drawn) -> Training:
    """The facts of the training pictures, (N, features); None where there are none."""
    if pictures is None:
        return Training(count=0, self_likeness=None, base_likeness=None)
    return Training(
        count=len(pictures),
        self_likeness=measures.self_likeness(pictures),
        base_likeness=measures.likeness(base.plain, pictures),
    )


def measured(drawn: Drawn, base: Drawn, pictures: Tensor | None) -> Measures:
    """The measures of a LoRA; `pictures` are the features of the training pictures, (N, features)."""
    copies = None
    if pictures is not None and len(pictures) > 1:
        copies = measures.nearest(drawn.plain, pictures) - _nearest_other(pictures)
    return Measures(
        likeness=None if pictures is None else measures.likeness(drawn.plain, pictures),
        adherence=adherence(drawn, base),
        diversity=measures.diversity(drawn.plain),
        memorisation=copies,
        drift=measures.drift(base.others, drawn.others) if len(base.others) else None,
        bleed=measures.drift(base.of_class, drawn.of_class) if len(base.of_class) else None,
        change=measures.drift(base.plain, drawn.plain),
    )


def adherence(drawn: Drawn, base: Drawn) -> float | None:
    """Mean cosine, at least 0, of what each wish changes with the LoRA and without; None for fewer than two wishes.

    A wish changes the features by their difference from the mean over the wishes.
    """
    if len(base.asked) < 2:
        return None
    with_lora, without = (F.normalize(one.asked - one.asked.mean(0), dim=1) for one in (drawn, base))
    return max(0.0, float((with_lora * without).sum(1).mean()))


def score(found: Measures, training: Training) -> float:
    """What the recommendation maximises: likeness, from that of the base model to that of the training pictures to one
    another, times adherence."""
    return _learnt(found, training) * (found.adherence or 0.0)


def verdict(found: Sequence[Measures], training: Training) -> Verdict:
    """Which of the LoRAs to use, in the order of their training."""
    if all(one.change < _UNCHANGED for one in found):
        return Verdict(outcome="changes nothing")
    if training.count == 0:
        return Verdict(outcome="no pictures")
    if not training.is_comparable:
        return Verdict(outcome="not comparable")
    if max(_learnt(one, training) for one in found) < _LEARNT:
        return Verdict(outcome="nothing learnt")
    scores = [score(one, training) for one in found]
    best = max(range(len(found)), key=scores.__getitem__)
    follows = found[best].adherence
    if follows is not None and follows == 0:
        return Verdict(outcome="ignores prompts")
    ignored = None
    if follows is not None:
        below = [place for place in range(best + 1, len(found)) if (found[place].adherence or 0) < _IGNORED * follows]
        ignored = next((place for place in below if all(later in below for later in range(place, len(found)))), None)
    copies = found[best].memorisation
    return Verdict(outcome="use", best=best, ignored_from=ignored, copied=copies is not None and copies > _COPIED)


def _learnt(found: Measures, training: Training) -> float:
    """Share of the way from the base model's likeness to that of the training pictures to one another, 0 to 1."""
    likeness, base, own = found.likeness, training.base_likeness, training.self_likeness
    if likeness is None or base is None or own is None:
        return 0.0
    return min(1.0, max(0.0, (likeness - base) / max(own - base, 1e-6)))


def _nearest_other(pictures: Tensor) -> float:
    """Mean cosine of each picture with the one that is most alike."""
    alike = pictures @ pictures.T
    return float(alike.masked_fill(torch.eye(len(pictures), dtype=torch.bool), -1).amax(1).mean())
