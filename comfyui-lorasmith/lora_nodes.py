"""Nodes for a LORA_MODEL, whichever trainer made it: saved for other programs, and checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from lorasmith.core.errors import LoraError
from lorasmith.families.loading import released_names
from lorasmith.formats.inspect import faults_of
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import PORTABLE, lora_of_tensors
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import grouped, guessed_family
from lorasmith.training.lora_handle import Lora

from .comfy_model import ComfyModel

CATEGORY = "model/training/Lorasmith"


class LoraTensors(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL with what a file says of it, as metadata."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def _said(lora: Mapping[str, Tensor]) -> Mapping[str, str]:
    return lora.metadata if isinstance(lora, LoraTensors) else {}


def _released(lora: Mapping[str, Tensor], *, needed: bool = False) -> ModelNames | None:
    """The names of the released model that a LoRA is for; None if it is for none that is known."""
    family = guessed_family({key: tuple(tensor.shape) for key, tensor in lora.items()}, _said(lora))
    return None if family is None else released_names(family, needed=needed)


class SaveLora:
    """A LoRA for other programs than ComfyUI."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a LoRA of a trainer in the layout that most programs read completely for its model, or in one of your "
        "choice. Nothing is overwritten. Needs lorasmith[models], which has the names of the models' layers."
    )
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        layouts = [PORTABLE, *(name for name, layout in LAYOUTS.items() if not layout.in_folder)]
        return {
            "required": {
                "lora": ("LORA_MODEL",),
                "prefix": ("STRING", {"default": "loras/Lorasmith", "tooltip": "May have folders."}),
                "layout": (layouts, {"default": PORTABLE, "tooltip": "How tensors are named."}),
            }
        }

    def save(self, lora: Mapping[str, Tensor], prefix: str, layout: str) -> dict[str, Any]:
        if (names := _released(lora, needed=True)) is None:
            raise LoraError(
                "a LoRA can be saved for other programs if it is for a released model of a family that is known here, "
                "and this one is not; save it with ComfyUI's Save LoRA Weights"
            )
        output = folder_paths.get_output_directory()
        place, stem, *_ = folder_paths.get_save_image_path(prefix, output)
        free = (Path(place) / f"{stem}_{number:05}_.safetensors" for number in itertools.count(1))
        path = next(path for path in free if not path.exists())
        state = lora_of_tensors(path, lora, _said(lora), names)
        Lora(state, names).save(path, layout=layout, metadata={"ss_output_name": path.stem, "modelspec.title": stem})
        return {"ui": {"text": [f"Saved as {path.relative_to(output)}."]}}


class CheckLora:
    """What is wrong with a LoRA, and what programs make of it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Checks a LoRA of a trainer for faults and for layers that a model does not have. With no model connected, it "
        "is compared with the released one of its family, if lorasmith[models] is installed."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("findings",)
    FUNCTION = "check"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora": ("LORA_MODEL",)}, "optional": {"model": ("MODEL",)}}

    def check(self, lora: Mapping[str, Tensor], model: Any = None) -> dict[str, Any]:
        names = _released(lora) if model is None else ComfyModel(model).names
        found = faults_of(lora, _said(lora), names, is_model_sure=model is not None)
        lines = [f"{one.problem}; {one.remedy}." for one in sorted(found, key=lambda one: not one.is_error)]
        against = "no model, as that of its family is not known" if names is None else names.family
        lines.insert(0, f"{len(grouped(lora))} layers, compared with {against}: {len(lines) or 'no'} findings.")
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (text,)}
