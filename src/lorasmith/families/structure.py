"""Models without weights, for commands that need names and shapes alone: of a file, and as released.

Released architectures, which most LoRAs are for, are built on the meta device from the published settings, which takes
a second and no memory for weights; so files of different layouts can be matched without a model.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.quantization import Packed
from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES
from lorasmith.families.files.checkpoint import OriginalCheckpoint, Shapes
from lorasmith.families.loading import load_model, model_of_checkpoint
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from lorasmith.formats.names.model_names import ModelNames


def load_structure(source: str | os.PathLike[str]) -> Model:
    """A model whose denoiser's matrices are on the meta device, with no text encoder and no autoencoder.

    Of a single file the header and the vectors are read, which takes a second or two for any size. Folders and hub
    ids are loaded by `load_model`, with the same errors.
    """
    path = built_in_models().get(str(source), Path(source))
    return model_of_checkpoint(_Outline(path)) if path.is_file() else load_model(source)


class _Outline(OriginalCheckpoint):
    """A checkpoint's denoiser, of which only vectors have values: some determine the parameterization."""

    def shapes_under(self, prefix: str) -> Shapes:
        return super().shapes_under(prefix) if prefix == self.denoiser_prefix else Shapes()

    def load(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {
            name: torch.empty(shape, device="meta") if len(shape) > 1 else self.vector(f"{prefix}{name}")
            for name, shape in self.shapes_under(prefix).items()
        }


@cache
def released_names(title: str) -> ModelNames | None:
    """The name table of a family's released model. None for unsupported families."""
    family = next((one for _, one in FAMILIES.items() if one.title == title), None)
    if family is None or family.released is None:
        return None
    return family.names(family.released_denoiser(), {})
