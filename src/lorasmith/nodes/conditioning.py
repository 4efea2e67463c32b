"""Prompts as the denoiser takes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from lorasmith.families.base import Conditioning
from lorasmith.families.model import TextEncoder
from lorasmith.workflow import Input, NodeContext, Output, node

__all__ = ["check_encoder"]

_ZEROED = ("context", "pooled")
"""Tensors that say what the prompt says; others, such as guidance, are settings."""


def check_encoder(clip: TextEncoder) -> None:
    """Raises ModelError for a model that came without its text encoders."""
    clip.base.family.check_parts(clip.base.components, text=True)


@node(
    "CLIPTextEncode",
    display_name="CLIP Text Encode (Prompt)",
    category="model/conditioning",
    inputs=[
        Input("text", "STRING", multiline=True, tooltip="(word:1.2) weighs a word; a backslash makes a bracket plain."),
        Input("clip", "CLIP"),
    ],
    outputs=[Output("CONDITIONING")],
    search_aliases=["prompt", "caption", "text prompt"],
)
def clip_text_encode(context: NodeContext, *, text: str, clip: TextEncoder) -> tuple[list[Conditioning]]:
    """Encode a prompt or a caption."""
    check_encoder(clip)
    with clip.active():
        return ([clip.encode(text)],)


@node(
    "CLIPSetLastLayer",
    display_name="CLIP Set Last Layer",
    category="model/conditioning",
    inputs=[
        Input("clip", "CLIP"),
        Input(
            "stop_at_clip_layer", "INT", default=-1, min=-24, max=-1, step=1, tooltip="-2 leaves out the last layer."
        ),
    ],
    outputs=[Output("CLIP")],
    search_aliases=["clip skip"],
)
def clip_set_last_layer(context: NodeContext, *, clip: TextEncoder, stop_at_clip_layer: int) -> tuple[TextEncoder]:
    """Leave out the last layers of the text encoder."""
    return (replace(clip, skip_layers=-1 - stop_at_clip_layer),)


@node(
    "ConditioningCombine",
    display_name="Conditioning (Combine)",
    category="model/conditioning/transform",
    inputs=[Input("conditioning_1", "CONDITIONING"), Input("conditioning_2", "CONDITIONING")],
    outputs=[Output("CONDITIONING")],
)
def conditioning_combine(
    context: NodeContext, *, conditioning_1: list[Conditioning], conditioning_2: list[Conditioning]
) -> tuple[list[Conditioning]]:
    """Put prompts side by side: sampling averages what they say, training gives each image its own."""
    return ([*conditioning_1, *conditioning_2],)


@node(
    "ConditioningZeroOut",
    display_name="Conditioning Zero Out",
    category="model/conditioning/transform",
    inputs=[Input("conditioning", "CONDITIONING")],
    outputs=[Output("CONDITIONING")],
)
def conditioning_zero_out(context: NodeContext, *, conditioning: list[Conditioning]) -> tuple[list[Conditioning]]:
    """Replace what prompts say by zeros, which is less than an empty prompt says."""
    return ([_zeroed(one) for one in conditioning],)


def _zeroed(conditioning: Conditioning) -> Conditioning:
    tensors = conditioning.tensors
    zeroed = {key: torch.zeros_like(t) if key in _ZEROED else t for key, t in tensors.items()}
    return Conditioning(zeroed, mask=conditioning.mask)
