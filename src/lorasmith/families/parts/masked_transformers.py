"""Transformers of diffusers that are changed: masks of Stable Diffusion 3, Lumina 2 and HunyuanVideo 1.5, and Chroma.

Stable Diffusion 3's ignores masks, without which captions of different length cannot share a batch: pictures would
attend to the padding of the shorter ones. Lumina 2's reads the lengths of texts off its mask, which on a device would
wait for the device in each step, and has no answer on the meta device. HunyuanVideo 1.5's does both, and its mask has
a number for each pair of tokens, of which clips have many. Chroma's copies a constant to the device in each pass, and
waits for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ChromaTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
from torch import Tensor


class MaskedSD3Transformer(SD3Transformer2DModel):  # type: ignore[misc]
    """SD3Transformer2DModel whose `joint_attention_kwargs` may hold an `attention_mask`.

    The mask is bool, (batch, 1, 1, picture tokens + text tokens), True for tokens that are attended to.

    The table of positions is on the meta device until that of a file is loaded: diffusers computes it in 20 seconds.
    """

    # diffusers reads names of settings from the signature.
    @functools.wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *, pos_embed_max_size: int = 96, **settings: Any) -> None:
        super().__init__(**settings, pos_embed_max_size=1)
        self.register_to_config(pos_embed_max_size=pos_embed_max_size)
        self.pos_embed.pos_embed_max_size = pos_embed_max_size
        self.pos_embed.pos_embed = torch.empty(1, pos_embed_max_size**2, self.inner_dim, device="meta")
        self.set_attn_processor(_JointAttention())


class _JointAttention:
    """Attention over tokens of the picture, and those of the text after them if there are any."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(rows: Tensor, norm: Any) -> Tensor:
            split = rows.reshape(*rows.shape[:2], attn.heads, -1).transpose(1, 2)
            normed: Tensor = split if norm is None else norm(split)
            return normed

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(rows, image_rotary_emb) for rows in (query, key))
        if encoder_hidden_states is None:  # the second attention of a dual block, of the picture to itself
            mixed = F.scaled_dot_product_attention(query, key, value)
            return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]
        query = torch.cat((query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)), dim=2)
        key = torch.cat((key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)), dim=2)
        value = torch.cat((value, heads(attn.add_v_proj(encoder_hidden_states), None)), dim=2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        picture, text = mixed[:, : hidden_states.shape[1]], mixed[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](picture)), text


class HostMaskedLumina2(Lumina2Transformer2DModel):  # type: ignore[misc]
    """Lumina2Transformer2DModel that reads lengths of texts off a mask on the CPU, bool, (batch, text tokens)."""

    rope_embedder: _TablesKept

    @functools.wraps(Lumina2Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rope_embedder.__class__ = _TablesKept

    def forward(self, *, mask_on_cpu: Tensor, **inputs: Any) -> Any:
        """The original's result; `mask_on_cpu` equals the `encoder_attention_mask`."""
        self.rope_embedder.mask_on_cpu = mask_on_cpu
        return super().forward(**inputs)


class _TablesKept(Lumina2RotaryPosEmbed):  # type: ignore[misc]
    """Rotary embeddings whose tables are copied to a GPU once, and whose mask is on the CPU."""

    freqs_cis: list[Tensor]
    mask_on_cpu: Tensor
    _there: list[Tensor] | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        return super().forward(hidden_states, self.mask_on_cpu)

    def _get_freqs_cis(self, ids: Tensor) -> Tensor:
        on_cpu = self.freqs_cis
        if ids.device.type != "cuda":
            return super()._get_freqs_cis(ids)  # type: ignore[no-any-return]
        if self._there is None or self._there[0].device != ids.device:
            self._there = [table.to(ids.device) for table in on_cpu]
        self.freqs_cis = self._there
        try:
            return super()._get_freqs_cis(ids)  # type: ignore[no-any-return]
        finally:
            self.freqs_cis = on_cpu


class DeviceChroma(ChromaTransformer2DModel):  # type: ignore[misc]
    """ChromaTransformer2DModel whose embedding of no guidance is made on its device."""

    @functools.wraps(ChromaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.time_text_embed.__class__ = _OfNoGuidance


class _OfNoGuidance(ChromaCombinedTimestepTextProjEmbeddings):  # type: ignore[misc]
    def forward(self, timestep: Tensor) -> Tensor:
        """(batch,) → (batch, modulations, 4 · channels): of the time, of guidance 0, and of each modulation's index."""
        guidance = torch.zeros_like(timestep)
        both = [self.time_proj(timestep).to(timestep.dtype), self.guidance_proj(guidance).to(timestep.dtype)]
        count = len(self.mod_proj)
        indices = self.mod_proj.to(timestep.dtype).expand(len(timestep), -1, -1)
        return torch.cat((torch.cat(both, dim=1)[:, None].expand(-1, count, -1), indices), dim=-1)


class MaskedHunyuanVideo15(HunyuanVideo15Transformer3DModel):  # type: ignore[misc]
    """HunyuanVideo15Transformer3DModel of a patch of one latent, whose kinds of text are each there or not.

    diffusers' fills each kind up to its longest, and a picture's embedding that is missing with zeros.
    """

    @functools.wraps(HunyuanVideo15Transformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for block in self.transformer_blocks:
            block.attn.set_processor(_JointAttention())

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """The prediction (batch, channels, frames, height, width); `timestep` is in fp32.

        The mask is bool, (batch, tokens), and of the first kind of text alone.
        """
        size = hidden_states.shape[2:]
        rotary = self.rope(hidden_states)
        modulation = self.time_embed.timestep_embedder(self.time_embed.time_proj(timestep).to(hidden_states.dtype))
        kinds = {0: self._refined(encoder_hidden_states, timestep, encoder_attention_mask)}
        if encoder_hidden_states_2 is not None:
            kinds[1] = self.context_embedder_2(encoder_hidden_states_2)
        if image_embeds is not None:
            kinds[2] = self.image_embedder(image_embeds)
        kind_of = self.cond_type_embed
        text = torch.cat(
            [rows + kind_of(torch.full_like(rows[..., 0], kind, dtype=torch.long)) for kind, rows in kinds.items()], 1
        )
        states = self.x_embedder(hidden_states)
        mask = None
        if encoder_attention_mask is not None:
            seen = encoder_attention_mask
            others = seen.new_ones(len(seen), states.shape[1] + text.shape[1] - seen.shape[1])
            pictures = states.shape[1]
            mask = torch.cat((others[:, :pictures], seen, others[:, pictures:]), dim=1)[:, None, None]
        for block in self.transformer_blocks:
            states, text = block(states, text, modulation, mask, rotary)
        predicted: Tensor = self.proj_out(self.norm_out(states, modulation)).transpose(1, 2).unflatten(2, size)
        return predicted

    def _refined(self, text: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
        """The first kind of text as the blocks take it."""
        embedder = self.context_embedder
        shown = text if mask is None else text * mask.unsqueeze(-1)
        pooled = shown.sum(dim=1) / (text.shape[1] if mask is None else mask.sum(dim=1, keepdim=True))
        modulation = embedder.time_text_embed(timestep, pooled)
        states: Tensor = embedder.proj_in(text)
        for block in embedder.token_refiner.refiner_blocks:
            states = block(states, modulation, None if mask is None else mask[:, None, None])
        return states
