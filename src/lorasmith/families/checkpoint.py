"""Single-file checkpoints in the original layout: what they hold, and whose they are.

Tensors are read when asked for, one component at a time. Recognition is our own (families look at names and shapes):
diffusers' detection takes every unknown file for Stable Diffusion 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.fp8 import check_formats, companions, scale_name, unscaled
from lorasmith.families.unsupported import looks_like
from lorasmith.formats.container import check_safetensors

__all__ = ["ARCHITECTURE", "OriginalCheckpoint", "recognise"]

ARCHITECTURE = "lorasmith.architecture"
"""Metadata key under which a checkpoint may say what shapes leave open: JSON, settings by component."""

# Full checkpoints put the denoiser under the first; other tools save it alone under one of the others, or under none.
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "model.", "")
_LORA_MARKS = ("lora_", "lora.", "hada_w", "lokr_w", "oft_blocks")


class Shapes(dict[str, tuple[int, ...]]):
    """Tensor shapes by name. Looking up a tensor that the file lacks raises ModelError: the file is at fault."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ModelError(f"the checkpoint lacks {name}; it is incomplete or was cut short")


class OriginalCheckpoint:
    """A safetensors file in the original layout, in whatever precision; of fp8 files see `families.fp8`.

    Args:
        path: the file.

    Raises:
        ModelError: the file is missing, pickled, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = check_safetensors(path, error=ModelError)
        self._names = frozenset(header.tensors)
        besides = companions(self._names)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in header.tensors.items() if name not in besides
        }
        self.metadata: Mapping[str, str] = header.metadata

    @cached_property
    def denoiser_prefix(self) -> str:
        """What stands before the denoiser's names: the first known prefix that more than five tensors carry."""
        counts = {prefix: sum(name.startswith(prefix) for name in self.shapes) for prefix in _DENOISER_PREFIXES}
        return next((prefix for prefix in _DENOISER_PREFIXES if counts[prefix] > 5), "")

    @cached_property
    def denoiser_shapes(self) -> Shapes:
        """Shapes of the denoiser's tensors by their name without prefix."""
        return self.shapes_under(self.denoiser_prefix)

    @cached_property
    def architecture(self) -> dict[str, dict[str, Any]]:
        """Settings that the file itself gives for `unet`, `vae`, `text_encoder` and `defaults`; most give none."""
        try:
            said = json.loads(self.metadata.get(ARCHITECTURE, "{}"))
            return {component: dict(settings) for component, settings in said.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{ARCHITECTURE} in the metadata of {self.path} must be settings by component in JSON; "
                "the file was damaged or edited, so get it again"
            ) from error

    def shapes_under(self, prefix: str) -> Shapes:
        """Shapes of the tensors whose names begin with `prefix`, which is cut off."""
        return Shapes(
            (name.removeprefix(prefix), shape) for name, shape in self.shapes.items() if name.startswith(prefix)
        )

    def load(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors whose names begin with `prefix`, which is cut off; floating-point ones in `dtype` if given.

        Raises:
            ModelError: weights are quantized in a way that is not known here.
        """
        tensors = {}
        with safe_open(self.path, framework="pt") as file:
            check_formats(self.path.name, self._names, self.metadata, file.get_tensor)
            for name in self.shapes:
                if name.startswith(prefix):
                    tensor = file.get_tensor(name)
                    if (scale := scale_name(name, self._names)) is not None:
                        tensor = unscaled(tensor, file.get_tensor(scale), name)
                    tensors[name.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensors


def recognise(checkpoint: OriginalCheckpoint) -> Family:
    """The family of a checkpoint. Raises ModelError when no family knows it."""
    shapes = checkpoint.denoiser_shapes
    # First, because some LoRAs carry a few of their model's own tensors as well.
    if any(mark in name for name in checkpoint.shapes for mark in _LORA_MARKS):
        raise ModelError(f"{checkpoint.path.name} is a LoRA, not a base model; give it as the LoRA and choose a model")
    for _, family in FAMILIES.items():
        if family.recognises(shapes):
            return family
    titles = ", ".join(family.title for _, family in FAMILIES.items())
    if (found := looks_like(shapes)) is not None:
        raise ModelError(f"{checkpoint.path.name} looks like {found}, which cannot be loaded here; known are {titles}")
    raise ModelError(
        f"{checkpoint.path.name} is of no architecture known here (its first tensors are "
        f"{', '.join(sorted(shapes)[:3])}); known are {titles}"
    )
