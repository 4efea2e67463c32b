"""Nodes for a LORA_MODEL, whichever trainer made it: saved for other programs, and checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from lorasmith.core.errors import LoraError
from lorasmith.core.printable import count_text
from lorasmith.data.dataset import Sample
from lorasmith.families.loading import released_names
from lorasmith.formats.inspect import faults_of
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import PORTABLE, lora_of_tensors
from lorasmith.formats.names import ModelNames
from lorasmith.formats.spelling import grouped, guessed_family
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.validation import History, Validator

from .comfy_model import ComfyModel
from .inputs import CATEGORY, NODE, TRAINED, config_of, samples_of, show_text


class LoraTensors(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL with what a file says of it, as metadata."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


_LORA = ("LORA_MODEL", {"tooltip": "Of a trainer, whichever it is."})


def _here(remedy: str) -> str:
    """A remedy of the command `lorasmith check`, as a node may name it."""
    here = remedy.replace("name it with --model", "link it to model")
    return here.replace("--fix", "`lorasmith check FILE --fix` in a terminal")


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
                "lora": _LORA,
                "prefix": ("STRING", {"default": "loras/Lorasmith", "tooltip": "May have folders."}),
                "layout": (layouts, {"default": PORTABLE, "tooltip": "How tensors are named."}),
            },
            "hidden": NODE,
        }

    def save(
        self, lora: Mapping[str, Tensor], prefix: str, layout: str, unique_id: str | None = None
    ) -> dict[str, Any]:
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
        text = f"Saved as {path.relative_to(output)}."
        show_text(text, unique_id)
        return {"ui": {"text": [text]}}


class CheckLora:
    """What is wrong with a LoRA, and what programs make of it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Checks a LoRA of a trainer for faults and for layers that a model does not have. With no model connected, it "
        "is compared with the released one of its family, if lorasmith[models] is installed."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("findings",)
    OUTPUT_TOOLTIPS = ("A sentence for each finding.",)
    FUNCTION = "check"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = (
            "MODEL",
            {"tooltip": "To compare layers with; by default the released one of its family."},
        )
        return {"required": {"lora": _LORA}, "optional": {"model": model}, "hidden": NODE}

    def check(self, lora: Mapping[str, Tensor], model: Any = None, unique_id: str | None = None) -> dict[str, Any]:
        names = _released(lora) if model is None else ComfyModel(model).names
        found = faults_of(lora, _said(lora), names, is_model_sure=model is not None)
        lines = [f"{one.problem}; {_here(one.remedy)}." for one in sorted(found, key=lambda one: not one.is_error)]
        against = "no model, as that of its family is not known" if names is None else names.family
        lines.insert(0, f"{len(grouped(lora))} layers, compared with {against}: {len(lines) or 'no'} findings.")
        text = "\n".join(lines)
        show_text(text, unique_id)
        return {"ui": {"text": [text]}, "result": (text,)}


class ValidateLora:
    """The loss on held-out images with a LoRA, beside that without it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures the loss on images that a LoRA was not trained on, with it and without it, on the same noise at all "
        "noise levels. Lower is better; LoRAs and strengths can be compared on the same images."
    )
    RETURN_TYPES = ("FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("loss", "loss_without", "findings")
    OUTPUT_TOOLTIPS = ("With the LoRA.", "Without it.", "Both in a sentence, with what chance may explain.")
    FUNCTION = "validate"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Of the LoRA, as of Load LoRA."
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01, "tooltip": tooltip}
        draws = {"default": 8, "min": 1, "max": 1000, "tooltip": "Noise levels at which each image is evaluated."}
        images = ("LATENT", {"tooltip": "Images that the LoRA was not trained on."})
        return {
            "required": {
                "lora": _LORA,
                **TRAINED,
                "latents": images,
                "strength": ("FLOAT", strength),
                "draws": ("INT", draws),
            },
            "hidden": NODE,
        }

    def validate(
        self,
        lora: Sequence[Mapping[str, Tensor]],
        model: Sequence[Any],
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Sequence[Any]],
        strength: Sequence[float],
        draws: Sequence[int],
        unique_id: Sequence[str | None] = (None,),
    ) -> dict[str, Any]:
        with torch.inference_mode(False):
            plain = ComfyModel(model[0])
            state = lora_of_tensors(Path("the LoRA"), lora[0], _said(lora[0]), plain.names)
            applied = Lora(state, plain.names).applied(plain, None, strength=strength[0], strict=True).denoiser
            samples = samples_of(plain, latents, positive)
            without, found = (_losses(one, samples, draws[0]).tolist() for one in (plain, applied))
        event = History(without).add(1, found)
        kind = "lower" if event.high < 0 else "higher" if event.low > 0 else "not clearly other"
        text = (
            f"{count_text(len(without), 'image')}: loss {event.loss:.4f} with the LoRA at strength {strength[0]:g}, "
            f"{event.base_loss:.4f} without; {kind} (difference {event.low:+.4f} to {event.high:+.4f} at 95 %)."
        )
        show_text(text, unique_id[0])
        return {"ui": {"text": [text]}, "result": (event.loss, event.base_loss, text)}


def _losses(model: ComfyModel, samples: Sequence[Sample], draws: int) -> Tensor:
    job = plan_job(model, config_of({"rank": 1, "training_dtype": "none"}, (), model), model.device)
    validator = Validator(model, samples, draws=draws, batch_size=1, device=job.way.device, dtype=job.way.dtype)
    with model.frozen(job.config, job.way):
        return validator()
