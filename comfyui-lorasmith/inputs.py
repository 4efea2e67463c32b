"""What several nodes take: their inputs by the engine's declarations, and settings, samples and texts made of these."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.printable import count_text
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.nodes.training import settings_of
from lorasmith.training.config import ResolvedConfig, TrainConfig
from lorasmith.training.methods.all_methods import methods_of, texts_needed_by
from lorasmith.workflow import Input

from .comfy_model import ComfyModel

CATEGORY = "model/training/Lorasmith"
SETTINGS_TYPE = "LORASMITH_SETTINGS"

TRAINED = {
    "model": ("MODEL", {"tooltip": "The model to train on; LoRAs on it are not trained."}),
    "latents": ("LATENT", {"tooltip": "The images, as a batch or as a list of batches of any sizes."}),
    "positive": ("CONDITIONING", {"tooltip": "One caption per image, or one for all."}),
}


TEXTS = {
    "clip": ("CLIP", {"tooltip": "The text encoders of the captions, for preserve and sliders of LoRA Settings."}),
    "captions": (
        "STRING",
        {"forceInput": True, "tooltip": "The captions as text, for preserve class: one per image, or one for all."},
    ),
    "trigger": (
        "STRING",
        {
            "default": "",
            "tooltip": "What stands for the subject in captions, in place of which preserve has the class.",
        },
    ),
}
"""Inputs for methods that encode texts."""

NODE = {"unique_id": "UNIQUE_ID"}
"""The hidden input of nodes that show text on themselves."""


def show_text(text: str, node: str | None) -> None:
    """Show a text on a node; editors leave out that of its outputs' `ui`."""
    instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node is not None and hasattr(instance, "send_progress_text"):
        instance.send_progress_text(text, node)


def widget(declared: Input, **others: Any) -> tuple[Any, dict[str, Any]]:
    """An input of ours as ComfyUI declares one."""
    names = ("default", "min", "max", "step", "tooltip", "advanced")
    found = {name: getattr(declared, name) for name in names}
    options = {name: value for name, value in found.items() if value is not None and value != "" and value is not False}
    if declared.type in ("BOOLEAN", "STRING"):
        options["default"] = declared.default
    if declared.type == "FLOAT":  # else editors round to whole numbers of `step`
        options["round"] = False
        options.setdefault("step", 1e-7 if declared.name == "learning_rate" else 0.01)
    if declared.name == "seed":  # else editors give each queueing another, and a run that was stopped never continues
        options["control_after_generate"] = "fixed"
    kind: Any = list(declared.options) if declared.type == "COMBO" and not callable(declared.options) else declared.type
    return kind, {**options, **others}


def config_of(given: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], model: ComfyModel) -> TrainConfig:
    """The settings of a training node and of LoRA Settings."""
    return settings_of(merged(given, settings, model), _found)


def merged(given: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], model: ComfyModel) -> dict[str, Any]:
    """The inputs of both nodes as those of one."""
    merged = {**given, **(settings[0] if settings else {})}
    if merged["training_dtype"] == "none" and next(model.module.parameters()).dtype != model.dtype:
        # `none` is the dtype of the weights, which may be too narrow to compute in. fp16 is had in this way alone.
        merged["training_dtype"] = "fp32" if model.dtype == torch.float32 else "bf16"
    if merged.get("gradient_checkpointing") and merged.get("activations", "keep") == "keep":
        merged |= {"gradient_checkpointing": False, "activations": "auto"}
    return merged


def samples_of(
    model: ComfyModel, latents: Sequence[Mapping[str, Tensor]], positive: Sequence[Sequence[Any]]
) -> tuple[Sample, ...]:
    """Samples of nodes' inputs, a caption for each image or one for all."""
    images, masks = images_of(latents)
    captions = [entry for one in positive for entry in one]
    return tuple(model.samples(images, one_for_each(captions, len(images)), masks))


def images_of(latents: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Latents (1, channels, ...) of each image, and its `noise_mask`, if it has one.

    Raises DataError for latents of several parts.
    """
    images, masks = list[Tensor](), list[Tensor | None]()
    for batch in latents:
        if getattr(batch["samples"], "is_nested", False):
            raise DataError(
                "latents to train on must be one tensor, but these have several parts, as those of clips with their "
                "sound have; use a model whose latents have one part"
            )
        mask = batch.get("noise_mask")
        for index, image in enumerate(batch["samples"]):
            images.append(image[None])
            masks.append(None if mask is None else mask[index % len(mask)][None])
    return images, masks


@dataclass(frozen=True)
class Texts:
    """What methods encode further texts with: ComfyUI's CLIP, and the captions as text."""

    clip: Any = None
    captions: Sequence[str] = ()
    trigger: str = ""

    def dataset(
        self,
        config: ResolvedConfig,
        model: ComfyModel,
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Sequence[Any]],
    ) -> EncodedDataset:
        """The samples, whose conditionings know those of the texts that the methods of a run need.

        Raises OptionError without a CLIP, or captions, that they need.
        """
        samples = samples_of(model, latents, positive)
        if (setting := texts_needed_by(config)) is None:
            return EncodedDataset(samples, trigger=self.trigger)
        if self.clip is None:
            raise OptionError(
                f"{setting} encodes texts in training, for which it needs the text encoders; link the CLIP of the "
                "captions to clip, or leave it out"
            )
        if config.preserve == "class" and not self.captions:
            raise OptionError(
                "preserve class changes captions, and conditionings do not have them as text; link the texts to "
                "captions, or use preserve blank"
            )
        entries = one_for_each([entry for one in positive for entry in one], len(samples))
        captions = one_for_each(self.captions or [""], len(samples), name="captions")
        images, _ = images_of(latents)
        rules = [rule for method in methods_of(config) for rule in method.texts.values()]
        texts = [[rule(caption, self.trigger) for rule in rules] for caption in captions]
        encoded = {
            text: self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0]
            for text in dict.fromkeys(itertools.chain(*texts))
        }
        # A text has the other options of its caption, such as guidance and sizes.
        others = [
            (image, (encoded[text][0], {**entry[1], **encoded[text][1]}))
            for image, entry, own in zip(images, entries, texts, strict=True)
            for text in own
        ]
        made = iter(model.samples(*map(list, zip(*others, strict=True))))
        found = []
        for sample, caption, own in zip(samples, captions, texts, strict=True):
            found.append(sample_with(sample, caption, {text: next(made).conditioning for text in own}))
        return EncodedDataset(
            tuple(found), EncodedCaptions(lambda text: Conditioning({}, text=text)), trigger=self.trigger
        )


def sample_with(sample: Sample, caption: str, others: Mapping[str, Conditioning]) -> Sample:
    """A sample whose conditioning knows those of further texts, of which a batch has ones of equal shapes."""
    kinds = [sorted((name, tuple(one.shape)) for name, one in other.tensors.items()) for other in others.values()]
    tensors = {**sample.conditioning.tensors, f"others#{kinds}": torch.empty(1, 0)}
    return replace(sample, conditioning=replace(sample.conditioning, tensors=tensors, text=caption, others=others))


def one_for_each(captions: Sequence[Any], count: int, name: str = "positive") -> list[Any]:
    if not count:
        raise DataError("latents must have an image to train on, and have none; link encoded pictures")
    if len(captions) not in (1, count):
        remedy = f"leave out {len(captions) - count}" if len(captions) > count else f"give {count}, or one"
        raise DataError(
            f"{name} must have one caption for all images or for each, got {count_text(len(captions), 'caption')} "
            f"for {count_text(count, 'image')}; {remedy}"
        )
    return [*captions] * (count // len(captions))


def _found(kind: str, name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(kind, name))
