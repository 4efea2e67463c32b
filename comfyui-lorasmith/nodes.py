"""The nodes, in ComfyUI's first form of them, which each of its versions has."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text
from lorasmith.data.dataset import EncodedDataset
from lorasmith.formats.lora_file import lora_tensors
from lorasmith.nodes.training import SETTINGS, beginning, settings_of
from lorasmith.runs.run import Host, run
from lorasmith.runs.view import ViewPublisher, note_of
from lorasmith.training.config import NONE_LORA
from lorasmith.training.events import Event, Outcome, RunStarted, StepDone, Validated
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.train import Plan
from lorasmith.workflow import Input

from .comfy_model import ComfyModel
from .lora_nodes import CATEGORY, CheckLora, LoraTensors, SaveLora

SETTINGS_TYPE = "LORASMITH_SETTINGS"

_SWAPPED = 18
"""Inputs of ComfyUI's own Train LoRA after its sockets, with which `SETTINGS` begins."""

_NOT_HERE = ("previews", "preview_every", "quantization", "compile", "training_adapter")
"""Settings that a MODEL does not follow: ComfyUI holds its weights and draws its pictures."""

_log = logging.getLogger("lorasmith")


def _widget(declared: Input, **others: Any) -> tuple[Any, dict[str, Any]]:
    """An input of ours as ComfyUI declares one."""
    names = ("default", "min", "max", "step", "tooltip", "advanced")
    found = {name: getattr(declared, name) for name in names}
    options = {name: value for name, value in found.items() if value is not None and value != "" and value is not False}
    if declared.type in ("BOOLEAN", "STRING"):
        options["default"] = declared.default
    if declared.type == "FLOAT":  # else editors round to whole numbers of `step`
        options["round"] = False
        options.setdefault("step", 1e-7 if declared.name == "learning_rate" else 0.01)
    kind: Any = list(declared.options) if declared.type == "COMBO" and not callable(declared.options) else declared.type
    return kind, {**options, **others}


class LoraSettings:
    """Everything else that a training may be told."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Further settings of Train LoRA (Lorasmith). Each is as if it were not there until it is changed."
    RETURN_TYPES = (SETTINGS_TYPE,)
    RETURN_NAMES = ("settings",)
    FUNCTION = "settings"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {one.name: _widget(one, advanced=False) for one in further_settings()}}

    def settings(self, **values: Any) -> tuple[dict[str, Any]]:
        return (values,)


class TrainLora:
    """ComfyUI's Train LoRA, on Lorasmith's engine; with the same inputs in the same order."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains a LoRA on the loaded model, with the inputs of ComfyUI's own node. The run is recorded in a folder in "
        "output/runs; interrupted, it keeps what was learnt, and the same inputs again continue it."
    )
    RETURN_TYPES = ("LORA_MODEL", "LOSS_MAP", "INT")
    RETURN_NAMES = ("lora", "loss_map", "steps")
    FUNCTION = "train"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        loras = [*folder_paths.get_filename_list("loras"), NONE_LORA]
        others: dict[str, dict[str, Any]] = {
            "gradient_checkpointing": {
                "tooltip": "Recompute what does not fit into memory, and no more. LoRA Settings can say how."
            }
        }
        widgets = {one.name: _widget(one, **others.get(one.name, {})) for one in SETTINGS[:_SWAPPED]}
        widgets["existing_lora"] = (loras, widgets["existing_lora"][1])
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to train on; LoRAs on it are not trained."}),
                "latents": ("LATENT", {"tooltip": "The images, as a batch or as a list of batches of any sizes."}),
                "positive": ("CONDITIONING", {"tooltip": "One caption per image, or one for all."}),
                **widgets,
            },
            "optional": {"settings": (SETTINGS_TYPE, {"tooltip": "Of LoRA Settings."})},
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    def train(
        self,
        model: Sequence[Any],
        latents: Sequence[Mapping[str, Tensor]],
        positive: Sequence[Sequence[Any]],
        settings: Sequence[Mapping[str, Any]] = (),
        prompt: Sequence[Any] = (),
        unique_id: Sequence[str] = (),
        **values: Sequence[Any],
    ) -> tuple[LoraTensors, dict[str, list[float]], int]:
        with torch.inference_mode(False):
            given = {name: value[0] for name, value in values.items()}
            trained = ComfyModel(model[0])
            images = [image[None] for batch in latents for image in batch["samples"]]
            captions = [entry for one in positive for entry in one]
            plan = Plan(
                job=plan_job(trained, settings_of(_merged(given, settings, trained), _found), trained.device),
                data=EncodedDataset(tuple(trained.samples(images, one_for_each(captions, len(images))))),
                source={"command": "ComfyUI", "prompt": prompt[0] if prompt else None},
            )
            host = NodeHost(trained, plan.job.config.steps, unique_id[0] if unique_id else None)
            result = run(plan, host)
            if result.reason is Outcome.CANCELLED:
                _log.info(_kept(result))
                raise management.InterruptProcessingException
            return _tensors_of(result.lora), {"loss": result.losses}, result.steps


def _tensors_of(lora: Lora) -> LoraTensors:
    return LoraTensors(lora_tensors(lora.state, lora.names, layout="comfy", dtype=lora.dtype), lora.metadata)


def further_settings() -> list[Input]:
    """The inputs of LoRA Settings."""
    return [one for one in SETTINGS[_SWAPPED:] if one.name not in _NOT_HERE]


def one_for_each(captions: Sequence[Any], count: int) -> list[Any]:
    if len(captions) not in (1, count):
        raise DataError(
            f"positive must have one caption for all images or for each, got {count_text(len(captions), 'caption')} "
            f"for {count_text(count, 'image')}; leave out what is too much"
        )
    return [*captions] * (count // len(captions))


def _merged(given: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], model: ComfyModel) -> dict[str, Any]:
    """The inputs of the node and of LoRA Settings as those of one node."""
    merged = {**given, **(settings[0] if settings else {})}
    if merged["training_dtype"] == "none" and next(model.module.parameters()).dtype != model.dtype:
        # `none` is the dtype of the weights, which may be too narrow to compute in. fp16 is had in this way alone.
        merged["training_dtype"] = "fp32" if model.dtype == torch.float32 else "bf16"
    if merged["gradient_checkpointing"] and merged.get("activations", "keep") == "keep":
        merged |= {"gradient_checkpointing": False, "activations": "auto"}
    return merged


def _found(kind: str, name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(kind, name))


@dataclass
class NodeHost(Host):
    """Shows a training on the node that runs it, in ComfyUI's progress bar and log."""

    model: ComfyModel
    steps: int
    node: str | None

    numbering = "_{:05}"

    def __post_init__(self) -> None:
        self.runs = Path(folder_paths.get_output_directory()) / "runs"
        self._bar = comfy.utils.ProgressBar(self.steps)
        self._publisher = ViewPublisher(lambda view: None)

    def cancelled(self) -> bool:
        if management.processing_interrupted():
            management.interrupt_current_processing(False)
            self.model.interrupted = True
        return self.model.interrupted

    def on_event(self, event: Event) -> None:
        self._publisher(event)
        match event:
            case StepDone():
                self._bar.update_absolute(event.step, self.steps)
                self._say(self._publisher.view.line)
            case Validated():
                _log.info("Step %s: %s", event.step, event.verdict)
            case RunStarted():
                _log.info(beginning(event))
        if (note := note_of(event)) is not None and note.kind != "Remark":
            (_log.warning if note.is_warning else _log.info)(note.text)

    def _say(self, text: str) -> None:
        instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if self.node is not None and hasattr(instance, "send_progress_text"):
            instance.send_progress_text(text, self.node)


def _kept(result: TrainResult) -> str:
    if not result.losses:
        return "Training was interrupted before its first step."
    return (
        f"Training was interrupted after {count_text(len(result.losses), 'step')}; the LoRA is at {result.path}, and "
        "the same inputs again continue the run."
    )


NODE_CLASS_MAPPINGS = {
    "LorasmithTrainLora": TrainLora,
    "LorasmithLoraSettings": LoraSettings,
    "LorasmithSaveLora": SaveLora,
    "LorasmithCheckLora": CheckLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LorasmithTrainLora": "Train LoRA (Lorasmith)",
    "LorasmithLoraSettings": "LoRA Settings (Lorasmith)",
    "LorasmithSaveLora": "Save LoRA, portable (Lorasmith)",
    "LorasmithCheckLora": "Check LoRA (Lorasmith)",
}
