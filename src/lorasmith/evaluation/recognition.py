"""Recognisers: features of pictures, by which two are compared, and whether a picture shows a wish."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.folders import BUILT_IN_JUDGE
from lorasmith.evaluation import likeness, measures
from lorasmith.evaluation.clip_model import ClipModel
from lorasmith.evaluation.judge import Judge, background_of, tensors
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES

_JUDGED = 0.7  # share of the judge's features in the likeness of two drawings
_FULFILLED = 0.5  # probability of a wish in the base model's picture, from which on a LoRA should fulfil it, too


@dataclass(frozen=True)
class WishScores:
    """Features, colours and probabilities of pictures of the trigger with a wish each, from several noises."""

    features: Tensor  # (noises, wishes, features)
    colours: Tensor  # (noises, wishes, colours)
    followed: Tensor | None  # (noises, wishes), the probability of each wish; None if unknown

    def adherence(self, base: WishScores) -> float | None:
        """How surely wishes are recognised, by the base model's pictures of them: from 0 to 1; None if unknown.

        Those count which the base model fulfils from the same noise. Where a picture alone does not tell, they are
        recognised by what they change, in the mean over the noises.
        """
        if self.followed is not None and base.followed is not None:
            counted = self.followed[base.followed >= _FULFILLED]
            return float(counted.mean()) if len(counted) else None
        sides = ([*zip(scores.features, scores.colours, strict=True)] for scores in (self, base))
        found = [measures.adherence(*pair) for pair in zip(*sides, strict=True)]
        return statistics.fmean(share or 0.0 for share in found) if found[0] is not None else None


class Recogniser:
    """Image features, which know no text."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, width) fp32 of length 1. Raises OptionError where the extra `likeness` is missing."""
        return likeness.features(pictures)

    def followed(self, wishes: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor | None:
        """Probability that each picture shows its wish, (N,); None if unknown."""
        return None

    def wish_scores(self, wishes: Sequence[str], pictures: Sequence[Image.Image]) -> WishScores:
        """The scores of pictures of all wishes, from each noise in turn."""
        shape = (len(pictures) // len(wishes), len(wishes))
        followed = self.followed([*wishes] * shape[0], pictures)
        return WishScores(
            features=self.features(pictures).unflatten(0, shape),
            colours=likeness.colours(pictures).unflatten(0, shape),
            followed=None if followed is None else followed.unflatten(0, shape),
        )


class ClipRecogniser(Recogniser):
    """A CLIP, which says by which of the wishes a picture is best described."""

    def __init__(self, folder: Path) -> None:
        self._clip = ClipModel(folder)

    def followed(self, wishes: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor | None:
        different = [*dict.fromkeys(wishes)]
        scores = self._clip.scale * self._clip.pictures(pictures) @ self._clip.texts(different).T
        own = torch.tensor([different.index(wish) for wish in wishes])
        return scores.softmax(1).gather(1, own[:, None])[:, 0]


class DrawingRecogniser(Recogniser):
    """The judge of the built-in model's drawings beside image features; alone it is worse on photos."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        shown = F.normalize(_judge().shown(tensors(pictures)), dim=1)
        return torch.cat(((1 - _JUDGED) ** 0.5 * likeness.features(pictures), _JUDGED**0.5 * shown), 1)

    def followed(self, wishes: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor | None:
        known = _judge().style_scores(tensors(pictures))[:, : len(STYLES)].softmax(1)
        found = []
        for wish, picture, by_style in zip(wishes, pictures, known, strict=True):
            style = [by_style[place] for place, words in enumerate(STYLES.values()) if words in wish]
            colour = [
                torch.tensor(float(background_of(picture) == colour_name)) for colour_name in _BACKGROUND.findall(wish)
            ]
            if not style and not colour:
                return None
            found.append(torch.stack([*style, *colour]).prod())
        return torch.stack(found)


_BACKGROUND = re.compile(rf"on an? ({'|'.join(BACKGROUNDS)}) background")


@cache
def _judge() -> Judge:
    return Judge.load()


def recogniser_of(*, is_built_in: bool, clip: Path | None = None) -> Recogniser:
    """The recogniser of a model's pictures; `clip` is a folder of a CLIP of transformers."""
    if clip is not None:
        return ClipRecogniser(clip)
    return DrawingRecogniser() if is_built_in and BUILT_IN_JUDGE.is_file() else Recogniser()
