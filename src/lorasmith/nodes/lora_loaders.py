"""Nodes that load LoRAs and apply them to models."""

from __future__ import annotations

from pathlib import Path

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.formats.lora_file import unapplied
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Input, NodeContext, Output, node

__all__: list[str] = []


def _strength(name: str, *, step: float | None = None) -> Input:
    tooltip = "Strength of the LoRA: 1 is as trained, 0 disables it."
    return Input(name, "FLOAT", default=1.0, min=-100.0, max=100.0, step=step, tooltip=tooltip)


_LORA_NAME = Input("lora_name", "COMBO", options=lambda folders: folders.files("loras"), tooltip="A LoRA file.")
_STRENGTH_MODEL = _strength("strength_model", step=0.01)
_ON_MODEL = (Input("model", "MODEL"), _LORA_NAME, _STRENGTH_MODEL)
_ON_BOTH = (
    Input("model", "MODEL"),
    Input("clip", "CLIP"),
    _LORA_NAME,
    _STRENGTH_MODEL,
    _strength("strength_clip", step=0.01),
)


def _file(folders: Folders, lora_name: str) -> object:
    return fingerprint(folders.find("loras", lora_name))


@node(
    "LoraLoader",
    display_name="Load LoRA (Model and CLIP)",
    category="model/loaders",
    inputs=_ON_BOTH,
    outputs=[Output("MODEL"), Output("CLIP")],
    fingerprint=_file,
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
    return _on_both(context, model, clip, lora_name, strength_model, strength_clip)


@node(
    "LoraLoaderBypass",
    display_name="Load LoRA (Bypass) (For debugging)",
    category="model/loaders",
    inputs=_ON_BOTH,
    outputs=[Output("MODEL"), Output("CLIP")],
    fingerprint=_file,
)
def lora_loader_bypass(
    context: NodeContext,
    *,
    model: Denoiser,
    clip: TextEncoder,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[Denoiser, TextEncoder]:
    """Apply a LoRA file to a model, beside its weights, and to its text encoders; the pictures are the same."""
    return _on_both(context, model, clip, lora_name, strength_model, strength_clip, bypass=True)


@node(
    "LoraLoaderModelOnly",
    display_name="Load LoRA",
    category="model/loaders",
    inputs=_ON_MODEL,
    outputs=[Output("MODEL")],
    fingerprint=_file,
)
def lora_loader_model_only(
    context: NodeContext, *, model: Denoiser, lora_name: str, strength_model: float
) -> tuple[Denoiser]:
    """Apply a LoRA file to a model."""
    return (_on_model(context, model, lora_name, strength_model),)


@node(
    "LoraLoaderBypassModelOnly",
    display_name="Load LoRA (Bypass, Model Only) (for debugging)",
    category="model/loaders",
    inputs=_ON_MODEL,
    outputs=[Output("MODEL")],
    fingerprint=_file,
)
def lora_loader_bypass_model_only(
    context: NodeContext, *, model: Denoiser, lora_name: str, strength_model: float
) -> tuple[Denoiser]:
    """Apply a LoRA file to a model, beside its weights; the pictures are the same."""
    return (_on_model(context, model, lora_name, strength_model, bypass=True),)


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
    # Into packed weights it cannot be merged, so that without bypass the weights decide.
    return (lora.applied_to(model, strength=strength_model, bypass=bypass or None),)


def _on_model(
    context: NodeContext, model: Denoiser, name: str, strength: float, *, bypass: bool | None = None
) -> Denoiser:
    """The model with a LoRA file, merged where that is possible unless `bypass`."""
    if not strength:
        return model
    lora = _loaded(context, context.folders.find("loras", name), model.base)
    return lora.applied_to(model, strength=strength, bypass=bypass)


def _on_both(
    context: NodeContext,
    model: Denoiser,
    clip: TextEncoder,
    name: str,
    strength_model: float,
    strength_clip: float,
    *,
    bypass: bool | None = None,
) -> tuple[Denoiser, TextEncoder]:
    """The model and the text encoders with a LoRA file.

    Args:
        context, model, clip, name, strength_model, strength_clip: of the node.
        bypass: run it beside the model's weights; None merges it where that is possible.
    """
    if not strength_model and not strength_clip:
        return model, clip
    path = context.folders.find("loras", name)
    lora = _loaded(context, path, model.base)
    for_text = Lora.load(path, clip.names)
    return (
        lora.applied_to(model, strength=strength_model, bypass=bypass),
        for_text.applied_to_text(clip, strength=strength_clip),
    )


def _loaded(context: NodeContext, path: Path, model: Model) -> Lora:
    """Load a LoRA file, with a warning about parts that match no module of the model."""
    lora = Lora.load(path, model)
    if left := unapplied(lora.state):
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        context.warn(f"{len(left)} parts of {path.name} match no module of {model.title} and are left out: {shown}")
    return lora
