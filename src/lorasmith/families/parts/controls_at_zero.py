"""Transformers of diffusers whose controls may be modulated as clean pictures, at time 0: Qwen-Image's and Krea 2's.

Qwen-Image's class decides it once for all of its calls, and Krea 2's has no such choice. Text is modulated like the
picture that is drawn, as in ComfyUI.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import Krea2Transformer2DModel, QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor, Krea2TextFusion, Krea2TransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn


class QwenImageTransformer(QwenImageTransformer2DModel):  # type: ignore[misc]
    """QwenImageTransformer2DModel whose attribute `zero_cond_t` may change between calls.

    Its blocks take it from their arguments, as they may run again in the backward pass.
    """

    # diffusers reads names of settings from the signature.
    @functools.wraps(QwenImageTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config = self.config
        sizes = (self.inner_dim, config.num_attention_heads, config.attention_head_dim)
        self.transformer_blocks = nn.ModuleList(_QwenBlock(*sizes) for _ in range(config.num_layers))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor,
        img_shapes: Sequence[list[tuple[int, int, int]]],
        **_: Any,
    ) -> tuple[Tensor]:
        """The prediction (batch, tokens, channels), for pictures whose sizes are the same in all of the batch.

        Positions of text follow the picture that is drawn, as in ComfyUI, and in diffusers' the largest of all.
        diffusers' copies the number of tokens to the device, and modulation's indices, and waits for both.
        """
        states, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
        timestep, modulate_index = timestep.to(states.dtype), None
        if self.zero_cond_t:
            timestep = torch.cat((timestep, timestep * 0))
            places = torch.arange(states.shape[1], device=states.device)
            modulate_index = (places >= math.prod(img_shapes[0][0])).int().expand(len(states), -1)
        modulation = self.time_text_embed(timestep, states)
        shapes, tokens = img_shapes[0], text.shape[1]
        rotary, _ = self.pos_embed([shapes], max_txt_seq_len=tokens, device=states.device)
        _, of_text = self.pos_embed([shapes[:1]], max_txt_seq_len=tokens, device=states.device)
        for block in self.transformer_blocks:
            text, states = block(
                hidden_states=states,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                temb=modulation,
                image_rotary_emb=(rotary, of_text),
                modulate_index=modulate_index,
            )
        return (self.proj_out(self.norm_out(states, modulation[: len(states)])),)


class _QwenBlock(QwenImageTransformerBlock):  # type: ignore[misc]
    zero_cond_t: bool

    def forward(self, *, modulate_index: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        if self.zero_cond_t != (is_at_zero := modulate_index is not None):
            self.zero_cond_t = is_at_zero
        states: tuple[Tensor, Tensor] = super().forward(**inputs, modulate_index=modulate_index)
        return states


class Modulation(NamedTuple):
    """Of the tokens before the last `controls`, and of these, each (batch, 1, 6 · width)."""

    before: Tensor
    after: Tensor
    controls: int


class Krea2Transformer(Krea2Transformer2DModel):  # type: ignore[misc]
    """Krea2Transformer2DModel, whose last `clean_tokens` of `hidden_states` may be modulated at time 0."""

    @functools.wraps(Krea2Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        config, width = self.config, self.hidden_size
        sizes = (width, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
        self.transformer_blocks = nn.ModuleList(_Krea2Block(*sizes, config.norm_eps) for _ in range(config.num_layers))
        self.text_fusion = _Krea2TextFusion(
            num_text_layers=config.num_text_layers,
            dim=config.text_hidden_dim,
            num_heads=config.text_num_attention_heads,
            num_kv_heads=config.text_num_key_value_heads,
            intermediate_size=config.text_intermediate_size,
            num_layerwise_blocks=config.num_layerwise_text_blocks,
            num_refiner_blocks=config.num_refiner_text_blocks,
            eps=config.norm_eps,
        )
        for block in self.text_fusion.layerwise_blocks:
            block.attn.set_processor(_AmongLayers(config.num_text_layers))

    def forward(
        self, hidden_states: Tensor, *, timestep: Tensor, clean_tokens: int = 0, **inputs: Any
    ) -> tuple[Tensor, ...]:
        if not clean_tokens:
            return super().forward(hidden_states, timestep=timestep, **inputs)  # type: ignore[no-any-return]
        dtype, mask, text = hidden_states.dtype, inputs["encoder_attention_mask"], inputs["encoder_hidden_states"]
        times = [self.time_embed(time, dtype=dtype) for time in (timestep, torch.zeros_like(timestep))]
        before, after = (self.time_mod_proj(F.gelu(time, approximate="tanh")) for time in times)
        modulation = Modulation(before, after, clean_tokens)
        whole = None
        if mask is not None:
            whole = torch.cat((mask, mask.new_ones(hidden_states.shape[:2])), dim=1)[:, None, None]
            mask = mask[:, None, None]
        states = self.txt_in(self.text_fusion(text, attention_mask=mask))
        states = torch.cat((states, self.img_in(hidden_states)), dim=1)
        rotary = self.rotary_emb(inputs["position_ids"])
        for block in self.transformer_blocks:
            states = block(states, modulation, rotary, whole)
        return (self.final_layer(states[:, text.shape[1] :], times[0]),)


class _Krea2TextFusion(Krea2TextFusion):  # type: ignore[misc]
    """diffusers' with the samples first in the input of every layer, where diffusers' has a list of tokens."""

    def forward(self, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens, layers = encoder_hidden_states.shape[1:3]
        each = encoder_hidden_states.flatten(1, 2)
        for block in self.layerwise_blocks:
            each = block(each)
        states: Tensor = self.projector(each.unflatten(1, (tokens, layers)).transpose(2, 3)).squeeze(-1)
        for block in self.refiner_blocks:
            states = block(states, attention_mask=attention_mask)
        return states


class _AmongLayers(Krea2AttnProcessor):  # type: ignore[misc]
    """Attention among the states of each token, of (batch, tokens · layers, width)."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = [layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = (
            states.reshape(-1, self._layers, *states.shape[2:])
            for states in (attn.norm_q(heads[0]), attn.norm_k(heads[1]), heads[2])
        )
        groups = attn.num_heads // attn.num_kv_heads
        mixed = dispatch_attention_fn(
            query,
            key.repeat_interleave(groups, dim=2),
            value.repeat_interleave(groups, dim=2),
            backend=self._attention_backend,
        )
        gate = torch.sigmoid(attn.to_gate(hidden_states))
        return attn.to_out[0](mixed.reshape_as(gate) * gate)  # type: ignore[no-any-return]


class _Krea2Block(Krea2TransformerBlock):  # type: ignore[misc]
    def forward(
        self, hidden_states: Tensor, temb: Tensor | Modulation, image_rotary_emb: Any, attention_mask: Tensor | None
    ) -> Tensor:
        if isinstance(temb, Tensor):
            return super().forward(hidden_states, temb, image_rotary_emb, attention_mask)  # type: ignore[no-any-return]
        counts = (hidden_states.shape[1] - temb.controls, temb.controls)
        tables = [modulation.unflatten(-1, (6, -1)) + self.scale_shift_table for modulation in temb[:2]]
        scale, shift, gate, late_scale, late_shift, late_gate = zip(
            *(table.unbind(-2) for table in tables), strict=True
        )

        def modulated(states: Tensor, scales: tuple[Tensor, ...], shifts: tuple[Tensor, ...]) -> Tensor:
            parts = zip(states.split(counts, dim=1), scales, shifts, strict=True)
            return torch.cat([(1.0 + by) * part + more for part, by, more in parts], dim=1)

        def gated(states: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
            return torch.cat([by * part for part, by in zip(states.split(counts, dim=1), gates, strict=True)], dim=1)

        mixed = self.attn(
            modulated(self.norm1(hidden_states), scale, shift),
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states = hidden_states + gated(mixed, gate)
        late = self.ff(modulated(self.norm2(hidden_states), late_scale, late_shift))
        return hidden_states + gated(late, late_gate)
