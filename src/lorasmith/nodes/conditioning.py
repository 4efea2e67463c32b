"""Nodes for prompts."""

from __future__ import annotations

from dataclasses import replace

import torch

from lorasmith.families.base import Conditioning
from lorasmith.families.model import TextEncoder
from lorasmith.workflow import Input, NodeContext, Output, node

__all__ = ["check_encoder"]

_ZEROED = ("context", "pooled")
"""Tensors that encode the prompt; others, such as guidance, are settings."""


def check_encoder(clip: TextEncoder) -> None:
    """Raise ModelError if the model was loaded without text encoders."""
    for component in clip.family.text_encoders:
        clip.family.text_encoder(clip.encoders, component)


@node(
    "CLIPTextEncode",
    display_name="CLIP Text Encode (Prompt)",
    category="model/conditioning",
    inputs=[
        Input("text", "STRING", multiline=True, tooltip="(word:1.2) weights a word; \\( is a literal bracket."),
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
        Input("stop_at_clip_layer", "INT", default=-1, min=-24, max=-1, step=1, tooltip="-2 skips the last layer."),
    ],
    outputs=[Output("CLIP")],
    search_aliases=["clip skip"],
)
def clip_set_last_layer(context: NodeContext, *, clip: TextEncoder, stop_at_clip_layer: int) -> tuple[TextEncoder]:
    """Skip the last layers of the text encoder."""
    return (replace(clip, encoding=replace(clip.encoding, skip_layers=-1 - stop_at_clip_layer)),)


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
    """Combine prompts into a list: sampling averages their predictions, training uses one per image."""
    return ([*conditioning_1, *conditioning_2],)


@node(
    "ConditioningZeroOut",
    display_name="Conditioning Zero Out",
    category="model/conditioning/transform",
    inputs=[Input("conditioning", "CONDITIONING")],
    outputs=[Output("CONDITIONING")],
)
def conditioning_zero_out(context: NodeContext, *, conditioning: list[Conditioning]) -> tuple[list[Conditioning]]:
    """Replace the encoded prompts by zeros, which differs from an empty prompt."""
    return ([_zeroed(one) for one in conditioning],)


def _zeroed(conditioning: Conditioning) -> Conditioning:
    tensors = conditioning.tensors
    zeroed = {key: torch.zeros_like(t) if key in _ZEROED else t for key, t in tensors.items()}
    return Conditioning(zeroed, mask=conditioning.mask)
