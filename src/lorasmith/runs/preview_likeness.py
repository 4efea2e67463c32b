"""Previews compared with the training images, by image features (`evaluation.likeness`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from lorasmith.data.clips import open_still
from lorasmith.evaluation import likeness, measures
from lorasmith.evaluation.recognition import Recogniser, WishScores
from lorasmith.report.pictures import Clip, PictureOrClip
from lorasmith.sampling.generate import clip_of
from lorasmith.training.events import LikenessMeasured
from lorasmith.training.train import Plan

_MOST_IMAGES, _MOST_DECODED = 24, 8  # that previews are compared with, from files and from latents


class PreviewLikeness:
    """Measures the pictures of a preview; the last of its prompts are the trigger with each of the wishes.

    Likeness is that of the other prompts' pictures, adherence that of the wishes; of clips, the first frames count.
    """

    def __init__(self, trained: Sequence[Image.Image], recogniser: Recogniser, wishes: Sequence[str] = ()) -> None:
        self._recogniser, self._wishes = recogniser, wishes
        self._trained = recogniser.features(trained)
        self._own = measures.self_likeness(self._trained)
        self._base: tuple[float, WishScores | None] | None = None  # of the base model

    def measured(self, step: int, drawn: Sequence[PictureOrClip], base: Sequence[PictureOrClip]) -> LikenessMeasured:
        """The measures of the pictures of a LoRA after `step` updates, and of the base model's from the same noise."""
        if self._base is None:
            self._base = self._measured(base)
        (alike, asked), (base_alike, base_asked) = self._measured(drawn), self._base
        adherence = None if asked is None or base_asked is None else asked.adherence(base_asked)
        learnt = measures.learnt(alike, base_alike, self._own)
        score = learnt if adherence is None else learnt * adherence
        return LikenessMeasured(step=step, likeness=alike, own=self._own, adherence=adherence, score=score)

    def _measured(self, drawn: Sequence[PictureOrClip]) -> tuple[float, WishScores | None]:
        """Likeness, and what is seen of the wishes."""
        pictures = [picture.frames[0] if isinstance(picture, Clip) else picture for picture in drawn]
        plain = len(pictures) - len(self._wishes)
        alike = measures.likeness(self._recogniser.features(pictures[:plain]), self._trained)
        return alike, self._recogniser.wish_scores(self._wishes, pictures[plain:]) if self._wishes else None


def trained_pictures(plan: Plan) -> list[Image.Image]:
    """Some of a run's images, evenly spaced, without those of the class: from their files, else from their latents."""
    if files := [image.path for image in plan.images if not image.is_class]:
        return [open_still(path, 2 * likeness.EDGE) for path in _spread(files, _MOST_IMAGES)]
    assert plan.denoiser is not None
    base, device = plan.denoiser.base, plan.job.way.device
    samples = list({sample.name: sample for sample in plan.data.samples if not sample.is_class}.values())
    with base.autoencoder.active(device):
        return [clip_of(base, sample.latents[None]).frames[0] for sample in _spread(samples, _MOST_DECODED)]


_T = TypeVar("_T")


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else list(items)
