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
    """Two networks of four convolutions: one knows so many subjects, the other so many styles of any subject."""

    def __init__(self, subjects: int, styles: int) -> None:
        super().__init__()
        self.features = _convolutions()
        self.hidden = nn.Linear(_WIDTHS[-1] * 4 * 4, 64)
        self.subject = nn.Linear(64, subjects)
        self.style_features = _convolutions()
        self.style = nn.Linear(_WIDTHS[-1] * 2, styles)

    @classmethod
    def load(cls) -> Self:
        """The trained judge."""
        tensors = {name: tensor.float() for name, tensor in load_file(BUILT_IN_JUDGE).items()}
        judge = cls(len(tensors["subject.weight"]), len(tensors["style.weight"]))
        judge.load_state_dict(tensors)
        return judge.eval().requires_grad_(False)

    def shown(self, pictures: Tensor) -> Tensor:
        """Features of what pictures (batch, 3, 64, 64) in [−1, 1] show, (batch, 64)."""
        # Coarse places matter to what is shown, not to how it is drawn.
        hidden: Tensor = self.hidden(F.adaptive_avg_pool2d(self.features(pictures), 4).flatten(1))
        return hidden

    def subject_scores(self, pictures: Tensor) -> Tensor:
        """(batch, 67)."""
        scores: Tensor = self.subject(F.silu(self.shown(pictures)))
        return scores

    def style_scores(self, pictures: Tensor) -> Tensor:
        """(batch, 7), those of STYLES first."""
        maps = self.style_features(pictures).flatten(2)
        scores: Tensor = self.style(torch.cat((maps.mean(2), maps.std(2)), 1))
        return scores


_WIDTHS = (3, 32, 64, 96, 128)


def _convolutions() -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inside, outside) in enumerate(itertools.pairwise(_WIDTHS)):
        layers += [nn.Conv2d(inside, outside, 3, stride=1 + (index > 0), padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outside), nn.SiLU()]
    return nn.Sequential(*layers)


def tensors(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [−1, 1]."""
    small = [np.asarray(picture.convert("RGB").resize((EDGE, EDGE)), np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(small)).movedim(-1, 1) / 127.5 - 1


def background_of(picture: Image.Image) -> str:
    """The named colour nearest to the picture's corners."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    corners = pixels[[2, 2, -3, -3], [2, -3, 2, -3]]
    corner = np.median(corners, 0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(corner - BACKGROUNDS[name]).sum()))
