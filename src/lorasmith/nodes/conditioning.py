"""Nodes that change encoded prompts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.base import Conditioning
from lorasmith.workflow import Input, NodeContext, Output, node

_ENCODED = ("context", "pooled")  # tensors that encode the prompt; others, such as guidance, are settings


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
    "ConditioningAverage",
    display_name="Conditioning (Average)",
    category="model/conditioning/transform",
    inputs=[
        Input("conditioning_to", "CONDITIONING"),
        Input("conditioning_from", "CONDITIONING", tooltip="Its first prompt is mixed into all of the others."),
        Input("conditioning_to_strength", "FLOAT", default=1.0, min=0.0, max=1.0, step=0.01),
    ],
    outputs=[Output("CONDITIONING")],
    search_aliases=["blend prompts", "mix prompts"],
)
def conditioning_average(
    context: NodeContext,
    *,
    conditioning_to: list[Conditioning],
    conditioning_from: list[Conditioning],
    conditioning_to_strength: float,
) -> tuple[list[Conditioning]]:
    """Average encoded prompts; a shorter or longer `conditioning_from` is padded with zeros or cut."""
    if not conditioning_from:
        raise DataError("conditioning_from must be a prompt, got none; encode one")
    if len(conditioning_from) > 1:
        context.warn(f"conditioning_from takes one prompt but received {len(conditioning_from)}; the first one is used")
    return ([_average(one, conditioning_from[0], conditioning_to_strength) for one in conditioning_to],)


@node(
    "ConditioningZeroOut",
    display_name="Conditioning Zero Out",
    category="model/conditioning/transform",
    inputs=[Input("conditioning", "CONDITIONING")],
    outputs=[Output("CONDITIONING")],
)
def conditioning_zero_out(context: NodeContext, *, conditioning: list[Conditioning]) -> tuple[list[Conditioning]]:
    """Replace the encoded prompts by zeros, which differs from an empty prompt."""
    zeroed = (
        {key: torch.zeros_like(tensor) if key in _ENCODED else tensor for key, tensor in one.tensors.items()}
        for one in conditioning
    )
    return ([replace(one, tensors=tensors, text=None) for one, tensors in zip(conditioning, zeroed, strict=True)],)


@node(
    "ConditioningSetTimestepRange",
    display_name="ConditioningSetTimestepRange",
    category="model/conditioning/transform",
    inputs=[
        Input("conditioning", "CONDITIONING"),
        Input("start", "FLOAT", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling; 0 is noise."),
        Input("end", "FLOAT", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Part of sampling; 1 is the picture."),
    ],
    outputs=[Output("CONDITIONING")],
)
def conditioning_set_timestep_range(
    context: NodeContext, *, conditioning: list[Conditioning], start: float, end: float
) -> tuple[list[Conditioning]]:
    """Use prompts for a part of sampling only; training uses them at every noise level."""
    return ([replace(one, span=(start, end)) for one in conditioning],)


@node(
    "FluxGuidance",
    display_name="FluxGuidance",
    category="model/conditioning/flux",
    inputs=[
        Input("conditioning", "CONDITIONING"),
        Input("guidance", "FLOAT", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt."),
    ],
    outputs=[Output("CONDITIONING")],
)
def flux_guidance(
    context: NodeContext, *, conditioning: list[Conditioning], guidance: float
) -> tuple[list[Conditioning]]:
    """Set the guidance that distilled models have as an input; others ignore it."""
    return ([_with(one, "guidance", torch.full((_batch(one),), guidance)) for one in conditioning],)


@node(
    "FluxDisableGuidance",
    display_name="FluxDisableGuidance",
    category="model/conditioning/flux",
    inputs=[Input("conditioning", "CONDITIONING")],
    outputs=[Output("CONDITIONING")],
)
def flux_disable_guidance(context: NodeContext, *, conditioning: list[Conditioning]) -> tuple[list[Conditioning]]:
    """Leave out the embedding of guidance that distilled models have; others ignore it."""
    return ([_with(one, "no_guidance", torch.zeros(_batch(one))) for one in conditioning],)


def _with(conditioning: Conditioning, name: str, value: Tensor) -> Conditioning:
    """The conditioning with one guidance setting replaced."""
    kept = {key: tensor for key, tensor in conditioning.tensors.items() if key not in ("guidance", "no_guidance")}
    return replace(conditioning, tensors={**kept, name: value})


def _batch(conditioning: Conditioning) -> int:
    return len(conditioning.tensors["context"])


def _average(to: Conditioning, from_: Conditioning, strength: float) -> Conditioning:
    """`strength · to + (1 − strength) · from_` of the tensors that encode prompts; settings are those of `to`."""
    tensors = dict(to.tensors)
    for name in _ENCODED:
        ours, theirs = tensors.get(name), from_.tensors.get(name)
        if theirs is None:
            continue
        if ours is None:
            tensors[name] = theirs
            continue
        if name == "context":
            theirs = _of_length(theirs, ours.shape[1])
        _check_widths(name, ours, theirs)
        tensors[name] = strength * ours + (1 - strength) * theirs
    return replace(to, tensors=tensors)


def _of_length(context: Tensor, tokens: int) -> Tensor:
    """(batch, tokens, ...) cut, or padded with zeros."""
    cut = context[:, :tokens]
    padding = cut.new_zeros(len(cut), tokens - cut.shape[1], *cut.shape[2:])
    return torch.cat((cut, padding), dim=1)


def _check_widths(name: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape[1:] != theirs.shape[1:]:
        raise DataError(
            f"averaged prompts must be from the same text encoders, got a {name} of width {ours.shape[-1]} and one of "
            f"{theirs.shape[-1]}; encode both with one CLIP"
        )
