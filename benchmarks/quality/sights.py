"""What looks at pictures: a judge of the built-in model's drawings, or image features for any other model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.quality.identity import Identity
from benchmarks.quality.subjects import Prompt, Task
from lorasmith.core.pretrained import load_pretrained
from lorasmith.evaluation import measures
from lorasmith.evaluation.clip_model import ClipModel
from lorasmith.evaluation.judge import background_of, tensors
from lorasmith.evaluation.recognition import Recogniser
from lorasmith.evaluation.verdict import Drawn
from tools.pretrain.judge import Judge

Features = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures → their features (N, width), rows of length 1."""


class Sight(Protocol):
    """Whether pictures show the subject, what the prompt asks for, and still their class."""

    def fidelity(self, task: Task, pictures: Sequence[Image.Image]) -> float:
        """How much pictures show the subject or style, from 0 to 1."""

    def shows(self, prompt: Prompt, picture: Image.Image) -> bool:
        """Whether a picture of the base model shows what a prompt asks for besides the subject."""

    def adherence(self, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> float | None:
        """How much the picture of each prompt shows what it asks for; None if unknown."""

    def bleed(self, task: Task, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float | None:
        """How much pictures of the class have become the subject; None without pictures, as a style has no class."""


def seen(sight: Recogniser, task: Task, rows: Sequence[Sequence[Image.Image]]) -> Drawn:
    """What `lorasmith evaluate` sees in pictures of the trigger and of each wish, a row for each noise."""
    asked = sight.wish_scores([one.plain for one in task.prompts], [one for row in rows for one in row[1:]])
    none = torch.zeros(0, asked.features.shape[-1])
    return Drawn(sight.features([row[0] for row in rows]), asked, others=none, of_class=none)


class JudgeSight:
    """A judge: probability of the subject, share of wishes fulfilled, share of pictures that lost their class."""

    def __init__(self, judge: Identity | Judge | None = None) -> None:
        self._judge = judge or Identity.load()

    def fidelity(self, task: Task, pictures: Sequence[Image.Image]) -> float:
        pixels = tensors(pictures)
        if task.of_style is not None:
            column = self._judge.style_names.index(task.of_style)
            return float(self._judge.style_scores(pixels).softmax(1)[:, column].mean())
        column = self._judge.subject_names.index(task.name)
        return float(self._judge.subject_scores(pixels).softmax(1)[:, column].mean())

    def shows(self, prompt: Prompt, picture: Image.Image) -> bool:
        if prompt.background is not None:
            return background_of(picture) == prompt.background
        if prompt.icon_set is not None:
            return self._judge.styles([picture]) == [prompt.icon_set]
        return self._judge.subjects([picture]) == [prompt.concept]

    def adherence(self, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> float | None:
        return statistics.mean(map(self.shows, prompts, pictures))

    def bleed(self, task: Task, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float | None:
        return sum(one != task.of_class for one in self._judge.subjects(after)) / len(after) if after else None


class FeatureSight:
    """Likeness to held-out pictures, likeness to the text where there is a CLIP, and growth of the class's likeness."""

    def __init__(self, features: Features, clip: Path | None) -> None:
        self._features, self._clip = features, None if clip is None else ClipModel(clip)

    def fidelity(self, task: Task, pictures: Sequence[Image.Image]) -> float:
        return measures.likeness(self._features(pictures), self._features(task.held_out))

    def shows(self, prompt: Prompt, picture: Image.Image) -> bool:
        return True  # there is no threshold

    def adherence(self, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> float | None:
        if self._clip is None:
            return None
        texts = self._clip.texts([one.plain for one in prompts])
        return float((self._clip.pictures(pictures) * texts).sum(1).mean())

    def bleed(self, task: Task, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float | None:
        return max(0.0, self.fidelity(task, after) - self.fidelity(task, before)) if after else None


def dino_features(folder: Path) -> Features:
    """Class tokens of a DINO of transformers in a folder."""
    from transformers import AutoImageProcessor, AutoModel

    processor = load_pretrained(AutoImageProcessor, folder)
    model = load_pretrained(AutoModel, folder, use_safetensors=True).eval()

    def found(pictures: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[one.convert("RGB") for one in pictures], return_tensors="pt")
        with torch.no_grad():
            return F.normalize(model(**inputs).last_hidden_state[:, 0], dim=1)

    return found
