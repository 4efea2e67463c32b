"""The judge of the benchmark: which subject a drawing shows, and in which style.

A network embeds drawings, so that those of one thing by different designers are near each other. It was trained on
other things, drawn by other designers: neither on the subjects, of development or of test, nor on the held-out sets.
Beside it are image features (EfficientNet-Lite0), which know no drawings: either alone recognises less. A candidate is
known by its prototype, the mean of what the held-out designers draw. A second network knows the style; it has seen
all styles, but in none of them a subject or one of UNTAUGHT. `python -m tools.pretrain identity` trains both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.evaluation import likeness
from lorasmith.evaluation.judge import tensors
from lorasmith.evaluation.wishes import STYLES
from lorasmith.sampling.generate import to_images
from tools.pretrain.data import CONCEPTS, HELD_OUT_STYLE
from tools.pretrain.subjects import DEVELOPMENT, SETS, TEST

FILE = Path(__file__).with_name("identity.safetensors")
CANDIDATES = (*CONCEPTS, *DEVELOPMENT, *TEST)
STYLED = (*SETS, HELD_OUT_STYLE)
WIDTH = 128  # of an embedding
_FEATURES = 1280  # of EfficientNet-Lite0
_EMBEDDED = 0.35  # share of the embedding in cosines, chosen on the known concepts and the development subjects


class Identity(nn.Module):
    """Embeddings, prototypes of CANDIDATES, and styles of STYLED, of pictures (batch, 3, 64, 64) in [−1, 1]."""

    subject_names, style_names = CANDIDATES, STYLED

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, 32, 2),
            _convolution(32, 64, 2),
            _Residual(64),
            _convolution(64, 128, 2),
            _Residual(128),
            _convolution(128, 192, 2),
        )
        self.embedding = nn.Linear(192 * 2 * 2, WIDTH)
        widths = itertools.pairwise((3, 32, 64, 96, 128))
        self.style_features = nn.Sequential(
            *(_convolution(inside, outside, 1 + (inside > 3)) for inside, outside in widths)
        )
        self.style = nn.Linear(128 * 2, len(STYLED))
        self.prototypes = nn.Parameter(torch.zeros(len(CANDIDATES), _FEATURES + WIDTH), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(16.0), requires_grad=False)

    @classmethod
    def load(cls) -> Self:
        """The trained judge."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
        return judge.eval().requires_grad_(False)

    def embedded(self, pictures: Tensor) -> Tensor:
        """(batch, 128), of length 1."""
        return F.normalize(self.embedding(F.adaptive_avg_pool2d(self.features(pictures), 2).flatten(1)).float(), dim=1)

    def identified(self, pictures: Tensor) -> Tensor:
        """Image features and embeddings (batch, 1408), of length 1."""
        found = likeness.features(to_images(pictures))
        return torch.cat(((1 - _EMBEDDED) ** 0.5 * found, _EMBEDDED**0.5 * self.embedded(pictures)), 1)

    def prototype(self, pictures: Tensor) -> Tensor:
        """The mean of pictures of one thing, of length 1."""
        return F.normalize(self.identified(pictures).mean(0), dim=0)

    def subject_scores(self, pictures: Tensor) -> Tensor:
        """(batch, candidates): scaled cosines, whose softmax is the probability of each."""
        return self.scale * self.identified(pictures) @ self.prototypes.T

    def style_scores(self, pictures: Tensor) -> Tensor:
        """(batch, styles)."""
        maps = self.style_features(pictures).flatten(2).float()
        scores: Tensor = self.style(torch.cat((maps.mean(2), maps.std(2)), 1))
        return scores

    def subjects(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The likeliest candidate of each picture."""
        return [CANDIDATES[index] for index in self.subject_scores(tensors(pictures)).argmax(1).tolist()]

    def styles(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The icon set of each picture, of those whose styles the model knows."""
        known = self.style_scores(tensors(pictures))[:, : len(STYLES)]
        return [STYLED[index] for index in known.argmax(1).tolist()]


def _convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.SiLU())


class _Residual(nn.Module):
    """Adds two convolutions, which start at nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.norm(self.second(self.first(x))))
