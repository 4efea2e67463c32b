"""Ideogram 4's transformer: diffusers' modules on a picture and its text, without rows for what is neither.

diffusers' class takes one sequence in which each token has its role. It gives the picture rows of text features, which
are 53248 numbers wide, projects the text's rows to latents, has a mask with a number for each pair of tokens, and
embeds times rounded to the dtype of the latents.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ideogram4 import IMAGE_POSITION_OFFSET, Ideogram4EmbedScalar
from torch import Tensor

_TIMES = 1e4  # of the embedding, at the clean end; also the base of its frequencies
_PATCH = 2


class Ideogram4Transformer(Ideogram4Transformer2DModel):  # type: ignore[misc]
    """Ideogram4Transformer2DModel that is given a picture and its text apart."""

    # diffusers reads names of settings from the signature.
    @functools.wraps(Ideogram4Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.t_embedding.__class__ = _TimeEmbedding
        for block in self.layers:
            block.attention.set_processor(_Attention())

    def forward(self, picture: Tensor, *, timestep: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """The velocity towards the clean picture (batch, channels, height, width).

        Args:
            picture: noisy latents (batch, channels, height, width), whose channels are those of the autoencoder, each
                in the four places of a patch.
            timestep: (batch,) in [0, 1] in fp32, 1 for the clean picture.
            text: states (batch, tokens, width).
            mask: bool (batch, tokens), True for tokens of the text that are no padding, which is at the end.
        """
        tokens, (height, width) = text.shape[1], picture.shape[-2:]
        kinds = self.embed_image_indicator(torch.arange(2, device=picture.device))
        words = self.llm_cond_proj(self.llm_cond_norm(text)) + kinds[0]
        states = torch.cat((words, self.input_proj(_tokens(picture)) + kinds[1]), dim=1)
        modulation = F.silu(self.adaln_proj(self.t_embedding(timestep, picture.dtype)[:, None]))
        rotary = self._rotary(tokens, height, width)
        attended = None
        if mask is not None:
            attended = torch.cat((mask, mask.new_ones(len(mask), height * width)), dim=1)[:, None, None]
        for block in self.layers:
            states = block(
                hidden_states=states, attention_mask=attended, image_rotary_emb=rotary, adaln_input=modulation
            )
        return _picture(self.final_layer(states[:, tokens:], conditioning=modulation), height, width)

    def _rotary(self, tokens: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (1, tokens of text and picture, 1, width of a head) of the rotary embedding.

        A word has its number on all axes. The picture's axes are time, rows and columns, counted from an offset, and
        take turns among the frequencies as far as `mrope_section` says; the others are time's.
        """
        frequencies = self.rotary_emb.inv_freq.float()
        device, index = frequencies.device, torch.arange(len(frequencies), device=frequencies.device)
        words = torch.arange(tokens, device=device).expand(3, -1)
        grid = torch.cartesian_prod(
            torch.zeros(1, dtype=torch.long, device=device),
            torch.arange(height, device=device),
            torch.arange(width, device=device),
        )
        places = torch.cat((words, grid.T + IMAGE_POSITION_OFFSET), dim=1).float()[:, :, None]
        place = places[0].expand(-1, len(frequencies))
        for axis in (1, 2):
            mine = (index % 3 == axis) & (index < 3 * self.config.mrope_section[axis])
            place = torch.where(mine, places[axis], place)
        angles = (place * frequencies).repeat(1, 2)[None, :, None]
        return angles.cos(), angles.sin()


class _TimeEmbedding(Ideogram4EmbedScalar):  # type: ignore[misc]
    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch,) in fp32 → (batch, width) in `dtype`."""
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = (_TIMES * time.float())[:, None] * torch.exp(steps * -(math.log(_TIMES) / (half - 1)))
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)
        return self.mlp_out(F.silu(self.mlp_in(waves)))  # type: ignore[no-any-return]


class _Attention:
    """Attention of all tokens to each other, whose rotation is computed in fp32."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.num_heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = _turned(attn.norm_q(query), image_rotary_emb).to(value.dtype)
        key = _turned(attn.norm_k(key), image_rotary_emb).to(value.dtype)
        mixed = dispatch_attention_fn(query, key, value, attn_mask=attention_mask)
        return attn.to_out[0](mixed.flatten(2))  # type: ignore[no-any-return]


def _turned(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Heads (batch, tokens, heads, width) in fp32, each pair of numbers half a head apart turned by its angle."""
    cos, sin = rotary
    numbers = heads.float()
    first, second = numbers.chunk(2, dim=-1)
    return numbers * cos + torch.cat((-second, first), dim=-1) * sin


def _tokens(latents: Tensor) -> Tensor:
    """(batch, 4 · channels, height, width) → (batch, height · width, 4 · channels), the autoencoder's channels last."""
    places: Tensor = latents.unflatten(1, (-1, _PATCH**2))
    return places.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)


def _picture(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_tokens`."""
    places: Tensor = tokens.unflatten(1, (height, width)).unflatten(3, (_PATCH**2, -1))
    return places.permute(0, 4, 3, 1, 2).flatten(1, 2)
