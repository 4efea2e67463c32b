"""Qwen-Image 2.1's transformer: diffusers' modules, with positions and attention that follow each caption's length.

Text, references and the picture are one sequence. Text attends to what is before it, a picture to that and to itself.
diffusers' class counts the positions of the picture from the end of the longest caption in a batch, finds the places of
pictures by reading tensors, for which a GPU waits, and embeds times rounded to the dtype of the latents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TransformerBlock
from torch import Tensor

Span = tuple[int, int, bool]
"""Start and end of tokens that follow each other, and whether they are text."""

_BASE = 10000.0  # of the rotary frequencies


class QwenImage21Transformer(QwenImage21Transformer2DModel):  # type: ignore[misc]
    """QwenImage21Transformer2DModel that is given pictures apart, and where they are in the text."""

    # diffusers reads names of settings from the signature.
    @functools.wraps(QwenImage21Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for block in self.transformer_blocks:
            block.__class__ = _Block
            block.attn.set_processor(_Attention())

    def forward(
        self,
        picture: Tensor,
        *,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        references: Sequence[Tensor] = (),
        places: Sequence[int] = (),
    ) -> Tensor:
        """The prediction (batch, channels, height, width).

        Args:
            picture: noisy latents (batch, channels, height, width); references likewise, in sizes of their own.
            timestep: (batch,) in [0, 1].
            text: states (batch, tokens, width).
            mask: bool (batch, tokens), True for tokens of the text that are no padding, which is at the end.
            places: number of tokens of the text before each reference.
        """
        words = self.txt_in(text)
        parts, spans, known, start = list[Tensor](), list[Span](), list[Tensor](), 0
        for stretch, reference in zip(_cut(words, places), (*references, None), strict=True):
            for part, is_text in ((stretch, True), (reference, False)):
                if part is None or not part.shape[1]:
                    continue
                parts.append(part if is_text else self.img_in(_tokens(part)))
                spans.append((start, start := start + parts[-1].shape[1], is_text))
        if mask is not None:
            for stretch, reference in zip(_cut(mask, places), (*references, None), strict=True):
                known += [stretch] if reference is None else [stretch, mask.new_ones(len(mask), _count(reference))]
            known.append(mask.new_ones(len(mask), _count(picture)))
        states = torch.cat((*parts, self.img_in(_tokens(picture))), dim=1)
        times = torch.cat((timestep, timestep.new_zeros(1))) if self.config.causal_condition else timestep
        embedded = self.time_text_embed(times.float(), states)
        modulation = self.modulation(embedded)
        sizes = [tuple(latents.shape[-2:]) for latents in (*references, picture)]
        rotary = rotated(text.shape[1], sizes, places, self.config.axes_dims_rope, mask, states.device)
        key_valid = torch.cat(known, dim=1) if known else None
        for block in self.transformer_blocks:
            states = block(
                hidden_states=states,
                modulation=modulation,
                rotary_emb=rotary,
                segments=spans,
                key_valid=key_valid,
            )
        drawn = self.proj_out(self.norm_out(states[:, start:], embedded[: len(picture)]))
        return drawn.transpose(1, 2).unflatten(2, picture.shape[-2:])  # type: ignore[no-any-return]


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def _count(latents: Tensor) -> int:
    return latents.shape[-2] * latents.shape[-1]


def _cut(rows: Tensor, places: Sequence[int]) -> list[Tensor]:
    """(batch, tokens, ...) before, between and after the places."""
    bounds = [0, *places, rows.shape[1]]
    return [rows[:, begin:end] for begin, end in itertools.pairwise(bounds)]


def rotated(
    tokens: int,
    sizes: Sequence[tuple[int, ...]],
    places: Sequence[int],
    axes: Sequence[int],
    mask: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (batch or 1, tokens of all, 1, half a head) of the rotary embedding.

    A word has one number on all axes. A picture has that of the next word in time, and counts rows and columns from its
    middle; words after it count on from there by its longer side. Padding counts as if it were not there.
    """
    parts, position = list[Tensor](), 0
    bounds = [0, *places, tokens]
    for begin, end, (rows, columns) in zip(bounds, bounds[1:], sizes, strict=False):
        parts.append(torch.arange(position, position + end - begin, device=device).expand(3, -1))
        position += end - begin
        time = torch.full((1,), position, device=device)
        grid = (torch.arange(side, device=device) - (side - side // 2) for side in (rows, columns))
        parts.append(torch.cartesian_prod(time, *grid).T)
        position += max(rows, columns)
    rotation = torch.cat(parts, dim=1)[None].float()
    if mask is not None:
        missing = torch.zeros(len(mask), rotation.shape[2], device=device)
        missing[:, rotation.shape[2] - sizes[-1][0] * sizes[-1][1] :] = (~mask).sum(1, keepdim=True)
        rotation = torch.cat((rotation[:, :1] - missing[:, None], rotation[:, 1:].expand(len(mask), -1, -1)), dim=1)
    angles = torch.cat(
        [
            rotation[:, axis, :, None] / torch.pow(_BASE, torch.arange(0, width, 2, device=device).float() / width)
            for axis, width in enumerate(axes)
        ],
        dim=-1,
    )[:, :, None]
    return angles.cos(), angles.sin()


class _Block(QwenImage21TransformerBlock):  # type: ignore[misc]
    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        segments: Sequence[Span],
        key_valid: Tensor | None,
    ) -> Tensor:
        """Where `modulation` has a row more than the batch, it is that of time 0, of all tokens before the picture."""
        noisy = None
        if len(modulation) > len(hidden_states):
            noisy = torch.arange(hidden_states.shape[1], device=hidden_states.device) >= segments[-1][1]
        found: Tensor = super().forward(
            hidden_states=hidden_states,
            modulation=modulation,
            rotary_emb=rotary_emb,
            target_token_mask=noisy,
            segments=segments,
            key_valid=key_valid,
        )
        return found


class _Attention:
    """Attention of each span to all tokens up to its end, and of the picture to all."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        segments: Sequence[Span],
        key_valid: Tensor | None,
        **_: Any,
    ) -> Tensor:
        heads = [layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        value = heads[2]
        query = _turned(attn.norm_q(heads[0]).to(value.dtype), rotary_emb)
        key = _turned(attn.norm_k(heads[1]).to(value.dtype), rotary_emb)
        mixed = []
        for start, end, is_text in (*segments, (segments[-1][1], query.shape[1], False)):
            mask = None if key_valid is None else key_valid[:, None, None, :end]
            if is_text:
                before = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
                mask = before if mask is None else before & mask
            mixed.append(dispatch_attention_fn(query[:, start:end], key[:, :end], value[:, :end], attn_mask=mask))
        return attn.to_out[1](attn.to_out[0](torch.cat(mixed, dim=1).flatten(2)))  # type: ignore[no-any-return]


def _turned(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Heads (batch, tokens, heads, width) whose pairs of numbers are turned by their angles, in fp32."""
    cos, sin = rotary
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).type_as(heads)
