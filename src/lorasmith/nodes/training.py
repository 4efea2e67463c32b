"""Train LoRA: ComfyUI's training node on this project's engine.

Inputs are declared once, in `TrainConfig`, with ComfyUI's defaults laid over them so that a graph's learning rate keeps
its meaning: alpha 1, the down matrix starting at zero, every Linear and convolution trained, no clipping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.core.errors import CancelledError
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.options import config_from, options_of
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Denoiser
from lorasmith.nodes.saving import save_lora
from lorasmith.nodes.values import (
    Latent,
    LossMap,
    check_channels,
    flat_conditionings,
    flat_latents,
    one_for_each,
    single,
)
from lorasmith.training.config import NONE_LORA, TrainConfig, unused_settings
from lorasmith.training.events import Event, EventHandler, RunStarted, StepDone, Warned
from lorasmith.training.lora import Lora
from lorasmith.training.train import TrainResult, train
from lorasmith.workflow import Input, NodeContext, Output, node

__all__: list[str] = []

_OPTIONS = options_of(TrainConfig)
_AUTO = "auto"
"""Choice of an own option that leaves it to the model."""


def _setting(name: str, **overrides: Any) -> Input:
    return Input.from_option(_OPTIONS[name], **overrides)


def _own(name: str, **overrides: Any) -> Input:
    """A setting that ComfyUI's node does not have."""
    return _setting(name, optional=True, **overrides)


_SETTINGS = (
    _setting("batch_size"),
    _setting("grad_accumulation_steps"),
    _setting("steps", default=16),
    _setting("learning_rate", default=5e-4, optional=False),
    _setting("rank", default=8),
    _setting("optimizer"),
    _setting("loss_function"),
    _setting("seed"),
    _setting("training_dtype", default="bf16", options=("bf16", "fp32", "none")),
    _setting("lora_dtype"),
    _setting("quantized_backward"),
    _setting("algorithm"),
    _setting("gradient_checkpointing", default=True),
    _setting("checkpoint_depth"),
    _setting("offloading"),
    _setting(
        "existing_lora",
        type="COMBO",
        optional=False,
        default=NONE_LORA,
        options=lambda folders: [*folders.files("loras"), NONE_LORA],
    ),
    _setting("bucket_mode"),
    _setting("bypass_mode"),
    _own("alpha", default=1.0),
    _own("targets", default="all"),
    _own("objective"),
    _own("timesteps", default=_AUTO, options=(_AUTO, *_OPTIONS["timesteps"].choices)),
    _own("max_grad_norm", default=0.0),
    _own("zero_init", default="down"),
    _own("private"),
)


def _continued_file(folders: Folders, existing_lora: str = NONE_LORA) -> object:
    return None if existing_lora == NONE_LORA else fingerprint(folders.find("loras", existing_lora))


@node(
    "TrainLoraNode",
    display_name="Train LoRA",
    category="model/training",
    inputs=[
        Input("model", "MODEL", tooltip="What to train on; LoRAs that it carries stay as they are."),
        Input("latents", "LATENT", tooltip="The images, as a batch or as a list of batches of any sizes."),
        Input("positive", "CONDITIONING", tooltip="One caption for each image, combined or as a list, or one for all."),
        *_SETTINGS,
    ],
    outputs=[Output("LORA_MODEL", "lora"), Output("LOSS_MAP", "loss_map"), Output("INT", "steps")],
    is_input_list=True,
    fingerprint=_continued_file,
)
def train_lora(
    context: NodeContext,
    *,
    model: list[Denoiser],
    latents: list[Latent],
    positive: list[list[Conditioning]],
    **settings: Sequence[Any],
) -> tuple[Lora, LossMap, int]:
    """Train a LoRA on images and their captions.

    The run is recorded in a folder of its own below `output/runs`, which also keeps the LoRA, whatever ends the run.
    """
    denoiser = single(context, "model", model)
    values = {name: single(context, name, given) for name, given in settings.items()}
    config = _config(context.folders, values)
    data = _dataset(denoiser, latents, positive)
    folder = _new_run_folder(context.folders)
    result = train(
        denoiser,
        data,
        config=config,
        output=folder,
        title=folder.name,
        on_event=_teller(context, config.steps, folder),
        cancelled=context.cancelled,
    )
    result = replace(result, lora=replace(result.lora, private=config.private))
    if result.reason == "cancelled":
        raise CancelledError(_keep_cancelled(context, result, title=folder.name))
    return result.lora, {"loss": result.losses}, result.steps


def _config(folders: Folders, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that the node's inputs stand for; inputs left out have the node's defaults."""
    defaults = {setting.name: setting.default for setting in _SETTINGS}
    chosen = defaults | dict(values)
    for name in unused_settings(chosen["algorithm"]):
        if chosen[name] == defaults[name]:  # nobody chose it, so nobody needs to hear that it changes nothing
            del chosen[name]
    if chosen["existing_lora"] != NONE_LORA:
        chosen["existing_lora"] = str(folders.find("loras", chosen["existing_lora"]))
    if chosen["timesteps"] == _AUTO:
        chosen["timesteps"] = None
    config: TrainConfig = config_from(TrainConfig, chosen)
    return config


def _dataset(
    denoiser: Denoiser, latents: Sequence[Latent], positive: Sequence[Sequence[Conditioning]]
) -> EncodedDataset:
    """The samples, in order, as the denoiser sees them. Raises DataError for counts and shapes that do not fit."""
    form = denoiser.base.components.latent
    for batch in latents:
        check_channels(batch["samples"], form.channels)
    images = flat_latents(latents)
    captions = one_for_each(flat_conditionings(positive), len(images), name="positive", of="conditioning")
    return EncodedDataset(
        tuple(
            Sample(form.to_model(image.float().cpu())[0], caption, f"image {number}")
            for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1)
        )
    )


def _new_run_folder(folders: Folders) -> Path:
    """`output/runs/lora_<counter>`, not made yet."""
    runs = folders.output / "runs"
    names = [entry.name for entry in runs.iterdir()] if runs.is_dir() else []
    taken = [int(match[1]) for name in names if (match := re.fullmatch(r"lora_(\d+)", name))]
    return runs / f"lora_{max(taken, default=0) + 1:05}"


def _teller(context: NodeContext, steps: int, folder: Path) -> EventHandler:
    """Training's events in the words of nodes."""

    def tell(event: Event) -> None:
        if isinstance(event, StepDone):
            context.progress(event.step, steps, text=f"loss {event.loss:.4g}")
        elif isinstance(event, Warned):
            context.warn(event.message)
        elif isinstance(event, RunStarted):
            context.log(
                f"Training {event.parameters:,} numbers in {event.adapters} layers on {event.samples} images for "
                f"{event.steps} steps, on {event.device} in {event.dtype}; the records are in {folder}."
            )

    return tell


def _keep_cancelled(context: NodeContext, result: TrainResult, *, title: str) -> str:
    """Put the LoRA of a run that was stopped where Train LoRA and the loaders find it; returns what to tell."""
    if not result.losses:
        return "training was cancelled before its first step"
    path = save_lora(context, result.lora, f"loras/{title}_cancelled", result.steps)
    message = f"training was cancelled after {len(result.losses)} steps; their LoRA is at {path}"
    context.log(message)
    return message
