"""The judge: a small classifier of drawings of 64 pixels, of what the built-in model draws and in which style.

`tools/pretrain` trains it; its weights are with the built-in model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.core.folders import BUILT_IN_JUDGE
from lorasmith.evaluation.wishes import BACKGROUNDS

EDGE = 64  # pixels of a picture


class Judge(nn.Module):
    """Four convolutions, an average over the picture, two answers: one of so many subjects, one of so many styles."""

    def __init__(self, subjects: int, styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 32, 64, 96, 128)
        for index, (inside, outside) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inside, outside, 3, stride=1 + (index > 0), padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outside), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(128 * 4 * 4, 64)
        self.subject = nn.Linear(64, subjects)
        self.style = nn.Linear(128, styles)

    @classmethod
    def load(cls) -> Self:
        """The trained judge."""
        tensors = {name: tensor.float() for name, tensor in load_file(BUILT_IN_JUDGE).items()}
        judge = cls(len(tensors["subject.weight"]), len(tensors["style.weight"]))
        judge.load_state_dict(tensors)
        return judge.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of subjects and of styles, (batch, 67) and (batch, 7), of pictures (batch, 3, 64, 64) in [−1, 1]."""
        hidden, styles = self.seen(pictures)
        return self.subject(F.silu(hidden)), styles

    def seen(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features of what is shown, (batch, 64), and scores of styles."""
        features = self.features(pictures)
        # Coarse places matter to what is shown, not to how it is drawn.
        coarse = F.adaptive_avg_pool2d(features, 4).flatten(1)
        return self.hidden(coarse), self.style(features.mean((2, 3)))


def tensors(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [−1, 1]."""
    small = [np.asarray(one.convert("RGB").resize((EDGE, EDGE)), np.float32) for one in pictures]
    return torch.from_numpy(np.stack(small)).movedim(-1, 1) / 127.5 - 1


def background_of(picture: Image.Image) -> str:
    """The named colour nearest to the picture's corners."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    corners = pixels[[2, 2, -3, -3], [2, -3, 2, -3]]
    corner = np.median(corners, 0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(corner - BACKGROUNDS[name]).sum()))
