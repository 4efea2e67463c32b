"""Nodes that load models and LoRAs, and apply LoRAs to models."""

from __future__ import annotations

from pathlib import Path

from lorasmith.core.folders import fingerprint
from lorasmith.families.loading import load_model
from lorasmith.families.model import Autoencoder, Denoiser, Model, TextEncoder
from lorasmith.formats.lora_file import unapplied
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Input, NodeContext, Output, node

__all__: list[str] = []


def _strength(name: str, *, step: float | None = None) -> Input:
    tooltip = "Strength of the LoRA: 1 is as trained, 0 disables it."
    return Input(name, "FLOAT", default=1.0, min=-100.0, max=100.0, step=step, tooltip=tooltip)


_LORA_NAME = Input("lora_name", "COMBO", options=lambda folders: folders.files("loras"), tooltip="A LoRA file.")


@node(
    "CheckpointLoaderSimple",
    display_name="Load Checkpoint",
    category="model/loaders",
    inputs=[
        Input(
            "ckpt_name",
            "COMBO",
            options=lambda folders: folders.files("checkpoints"),
            tooltip="A checkpoint file, or a diffusers folder.",
        )
    ],
    outputs=[Output("MODEL"), Output("CLIP"), Output("VAE")],
    fingerprint=lambda folders, ckpt_name: fingerprint(folders.find("checkpoints", ckpt_name)),
)
def load_checkpoint(context: NodeContext, *, ckpt_name: str) -> tuple[Denoiser, TextEncoder, Autoencoder]:
    """Load a model.

    Weights stay on the memory-mapped file; training and sampling place copies on their device, in their own dtype.
    """
    model = load_model(context.folders.find("checkpoints", ckpt_name))
    return model.denoiser, model.text_encoder, model.autoencoder


@node(
    "LoraLoader",
    display_name="Load LoRA (Model and CLIP)",
    category="model/loaders",
    inputs=[
        Input("model", "MODEL"),
        Input("clip", "CLIP"),
        _LORA_NAME,
        _strength("strength_model", step=0.01),
        _strength("strength_clip", step=0.01),
    ],
    outputs=[Output("MODEL"), Output("CLIP")],
    fingerprint=lambda folders, lora_name: fingerprint(folders.find("loras", lora_name)),
)
def lora_loader(
    context: NodeContext,
    *,
    model: Denoiser,
    clip: TextEncoder,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[Denoiser, TextEncoder]:
    """Apply a LoRA file to a model and its text encoders."""
    if not strength_model and not strength_clip:
        return model, clip
    path = context.folders.find("loras", lora_name)
    lora = _loaded(context, path, model.base)
    for_text = Lora.load(path, clip.names)
    return lora.applied_to(model, strength=strength_model), for_text.applied_to_text(clip, strength=strength_clip)


@node(
    "LoraLoaderModelOnly",
    display_name="Load LoRA",
    category="model/loaders",
    inputs=[Input("model", "MODEL"), _LORA_NAME, _strength("strength_model", step=0.01)],
    outputs=[Output("MODEL")],
    fingerprint=lambda folders, lora_name: fingerprint(folders.find("loras", lora_name)),
)
def lora_loader_model_only(
    context: NodeContext, *, model: Denoiser, lora_name: str, strength_model: float
) -> tuple[Denoiser]:
    """Apply a LoRA file to a model."""
    if not strength_model:
        return (model,)
    lora = _loaded(context, context.folders.find("loras", lora_name), model.base)
    return (lora.applied_to(model, strength=strength_model),)


@node(
    "LoraModelLoader",
    display_name="Load LoRA Model",
    category="model/loaders",
    inputs=[
        Input("model", "MODEL"),
        Input("lora", "LORA_MODEL"),
        _strength("strength_model"),
        Input(
            "bypass", "BOOLEAN", default=False, tooltip="Run the LoRA beside the weights; the pictures are the same."
        ),
    ],
    outputs=[Output("MODEL", "model")],
)
def lora_model_loader(
    context: NodeContext, *, model: Denoiser, lora: Lora, strength_model: float, bypass: bool
) -> tuple[Denoiser]:
    """Apply a LoRA from Train LoRA to a model."""
    return (lora.applied_to(model, strength=strength_model, bypass=bypass),)


def _loaded(context: NodeContext, path: Path, model: Model) -> Lora:
    """Load a LoRA file, with a warning about parts that match no module of the model."""
    lora = Lora.load(path, model)
    if left := unapplied(lora.state):
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        context.warn(f"{len(left)} parts of {path.name} match no module of {model.title} and are left out: {shown}")
    return lora
