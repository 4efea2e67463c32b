"""Nodes that load LoRAs and apply them to models."""

from __future__ import annotations

from dataclasses import replace

from lorasmith.adapters.catalogue import STRENGTH
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Input, NodeContext, Output, node


def _strength(name: str, *, step: float | None = None) -> Input:
    return Input.from_option(STRENGTH, name=name, min=-100.0, max=100.0, step=step)


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
    applied = lora.applied(model, None, strength=strength_model, bypass=bypass or None)
    _tell(context, applied.note)
    return (applied.denoiser,)


def _on_model(
    context: NodeContext, model: Denoiser, name: str, strength: float, *, bypass: bool | None = None
) -> Denoiser:
    """The model with a LoRA file, merged where possible unless `bypass`."""
    if not strength:
        return model
    lora = Lora.load(context.folders.find("loras", name), model.base)
    applied = lora.applied(model, None, strength=strength, bypass=bypass)
    _tell(context, applied.note)
    return applied.denoiser


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
    """Model and text encoders with a LoRA file, run beside the weights with `bypass`, else merged where possible."""
    if not strength_model and not strength_clip:
        return model, clip
    # The text encoders may be of another file than the model, with other modules.
    names = replace(model.base.names, text_encoders=clip.names.text_encoders)
    lora = Lora.load(context.folders.find("loras", name), names)
    applied = lora.applied(model, clip, strength=strength_model, text_strength=strength_clip, bypass=bypass)
    _tell(context, applied.note)
    return applied.denoiser, applied.encoder


def _tell(context: NodeContext, note: str) -> None:
    """Warn of parts of a LoRA that do not apply."""
    if note:
        context.warn(note)
