"""A small classifier of subject and style, which measures the pictures of a model.

It is trained on the same drawings as the model, and on the held-out style and subjects, so that it can measure whether
a LoRA has learnt them. Half of its pictures have passed through the autoencoder, as a model's pictures have. Its
weights are beside this file; `python -m tools.pretrain judge` trains them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.data.image_files import to_tensor
from tools.pretrain.data import CONCEPTS, HELD_OUT_STYLE, HELD_OUT_SUBJECTS, OTHER_SETS, STYLES

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SUBJECTS = (*CONCEPTS, *HELD_OUT_SUBJECTS)
SETS = (*STYLES, *OTHER_SETS, HELD_OUT_STYLE)


class Judge(nn.Module):
    """Four convolutions, an average over the picture, two answers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 32, 64, 96, 128)
        for index, (inside, outside) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inside, outside, 3, stride=1 + (index > 0), padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outside), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(128 * 4 * 4, 64)
        self.subject = nn.Linear(64, len(SUBJECTS))
        self.style = nn.Linear(128, len(SETS))

    @classmethod
    def load(cls) -> Judge:
        """The trained judge."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
        return judge.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of subjects (batch, 67) and styles (batch, 7) for pictures (batch, 3, 64, 64) in [−1, 1]."""
        features = self.features(pictures)
        # Coarse places matter to what is shown, not to how it is drawn.
        coarse = F.adaptive_avg_pool2d(features, 4).flatten(1)
        return self.subject(F.silu(self.hidden(coarse))), self.style(features.mean((2, 3)))

    def subjects(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The subject of each picture."""
        return [SUBJECTS[index] for index in self(tensors(pictures))[0].argmax(1).tolist()]

    def styles(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The icon set whose style each picture has."""
        return [SETS[index] for index in self(tensors(pictures))[1].argmax(1).tolist()]


def tensors(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in [−1, 1]."""
    return torch.stack([to_tensor(picture.convert("RGB").resize((64, 64))) for picture in pictures])


def colourless(pictures: Sequence[Image.Image], tolerance: int = 32) -> float:
    """Share of pixels whose channels differ by less than `tolerance` of 255: black, white and grey."""
    arrays: list[NDArray[np.int16]] = [np.asarray(picture.convert("RGB"), np.int16) for picture in pictures]
    return float(np.mean([(one.max(-1) - one.min(-1) < tolerance).mean() for one in arrays]))
