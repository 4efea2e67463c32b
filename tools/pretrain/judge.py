"""The judge, which measures the pictures of a model, with the names of what it knows.

It is trained on the same drawings as the model, and on the held-out style and subjects, so that it can measure whether
a LoRA has learnt them. Half of its pictures have passed through the autoencoder, as a model's pictures have.
`python -m tools.pretrain judge` trains it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorasmith.evaluation import judge
from lorasmith.evaluation.judge import tensors
from lorasmith.evaluation.wishes import STYLES
from tools.pretrain.data import CONCEPTS, HELD_OUT_STYLE, HELD_OUT_SUBJECTS, OTHER_SETS

SUBJECTS = (*CONCEPTS, *HELD_OUT_SUBJECTS)
SETS = (*STYLES, *OTHER_SETS, HELD_OUT_STYLE)


class Judge(judge.Judge):
    """The judge with names of its answers."""

    subject_names, style_names = SUBJECTS, SETS

    def __init__(self, subjects: int = len(SUBJECTS), styles: int = len(SETS)) -> None:
        super().__init__(subjects, styles)

    def subjects(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The subject of each picture."""
        return [SUBJECTS[index] for index in self.subject_scores(tensors(pictures)).argmax(1).tolist()]

    def styles(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The icon set whose style each picture has."""
        return [SETS[index] for index in self.style_scores(tensors(pictures)).argmax(1).tolist()]


def colourless(pictures: Sequence[Image.Image], tolerance: int = 32) -> float:
    """Share of pixels whose channels differ by less than `tolerance` of 255: black, white and grey."""
    arrays: list[NDArray[np.int16]] = [np.asarray(picture.convert("RGB"), np.int16) for picture in pictures]
    return float(np.mean([(one.max(-1) - one.min(-1) < tolerance).mean() for one in arrays]))
