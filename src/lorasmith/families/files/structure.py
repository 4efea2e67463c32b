"""A model's structure without its weights, for commands that need names and shapes alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.quantization import Packed
from lorasmith.families.files.checkpoint import OriginalCheckpoint, Shapes
from lorasmith.families.loading import load_model, model_of_checkpoint
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model

__all__ = ["load_structure"]


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
