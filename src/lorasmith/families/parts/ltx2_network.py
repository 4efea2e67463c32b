"""LTX-2's network for clips without sound: diffusers' modules for video, with the connector that makes its text.

The released transformer has two streams, of video and of sound, which attend to each other. ComfyUI leaves out the
stream of sound, and the attention to it, where there are no latents of sound; so does this network, which does not
hold their layers either, a quarter of the parameters. In diffusers transformer and connectors are two parts of a
pipeline; original files hold both.

diffusers' transformer has a row of modulation for each token of a clip whose first frame is given, eight times as
large as its states in LTX-2.3. Here there is one for each frame.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from diffusers.pipelines.ltx2.connectors import LTX2ConnectorTransformer1d
from torch import Tensor, nn

_ROWS = 1024  # of text, at least
_OF_SOUND = ("audio", "av_cross_attn", "video_to_audio", "video_a2v", "cross_attn_rope")
# Sizes of layers that are made and left out.
_LEAST_SOUND = {
    "audio_num_attention_heads": 1,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 6,
    "audio_in_channels": 1,
    "audio_out_channels": 1,
}


class LTX2Video(LTX2VideoTransformer3DModel):  # type: ignore[misc]
    """The transformer's video, with the connector of its text as `connectors.video_connector`."""

    def __init__(self, *, connectors: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**{**settings, **_LEAST_SOUND})
        for module in (self, *self.transformer_blocks):
            own = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
            for name in own:
                if name.startswith(_OF_SOUND):
                    delattr(module, name)
        for block in self.transformer_blocks:
            block.__class__ = _VideoBlock
        self.connectors = _Connectors(**(connectors or {}))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LTX2Video:
        """The network for configurations of diffusers: the transformer's, with the connectors' as an entry."""
        known = inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters
        return cls(**{name: value for name, value in config.items() if name in known}, connectors=config["connectors"])

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        frame_rate: Tensor,
        mask: Tensor | None = None,
        given: int = 0,
    ) -> Tensor:
        """The velocity, of the shape of `latents`.

        Args:
            latents: (batch, channels, frames, height, width).
            time: (batch,) noise levels up to 1000, in fp32.
            text: (batch, tokens, width) of projected states of the text encoder.
            frame_rate: (batch,) frames of the clip a second, in fp32; positions in time are seconds.
            mask: bool (batch, tokens), False for what a text is filled up with.
            given: how many of the first latents in time are clean, so that their time is 0.
        """
        frames, height, width = latents.shape[2:]
        rotary = self.rope(self._places(frames, height, width, frame_rate))
        states = self.proj_in(latents.flatten(2).transpose(1, 2))
        dtype = states.dtype
        times = time[:, None]
        if given:
            times = times.repeat(1, frames)
            times[:, :given] = 0
        modulation, embedded = (
            rows.unflatten(0, times.shape) for rows in self.time_embed(times.flatten(), hidden_dtype=dtype)
        )
        prompt = None
        if self.prompt_modulation:
            prompt = self.prompt_adaln(time, hidden_dtype=dtype)[0][:, None]
        context = self.connectors(text, mask)
        if self.config.use_prompt_embeddings:
            context = self.caption_projection(context)
        for block in self.transformer_blocks:
            states = block(states, context, modulation, prompt, rotary)
        shift, scale = (self.scale_shift_table + embedded[:, :, None]).unbind(2)
        out = self.proj_out(_modulated(self.norm_out(states), shift, scale))
        return out.transpose(1, 2).unflatten(2, (frames, height, width))  # type: ignore[no-any-return]

    def _places(self, frames: int, height: int, width: int, frame_rate: Tensor) -> Tensor:
        """Middle of each token in seconds and pixels, (batch, 3, tokens)."""
        rope, rates = self.rope, frame_rate.float().view(-1, 1)
        by_frame, *sides = rope.scale_factors
        # The first latent in time is one frame, all others several.
        starts = torch.arange(frames + 1, dtype=torch.float32, device=rates.device) * by_frame
        starts = (starts + rope.causal_offset - by_frame).clamp(min=0)
        axes = [(starts[:-1] + starts[1:]) / 2]
        for side, count in zip(sides, (height, width), strict=True):
            axes.append((torch.arange(count, dtype=torch.float32, device=rates.device) + 0.5) * side)
        seconds, *pixels = torch.meshgrid(*axes, indexing="ij")
        rows = [axis.flatten().expand(len(rates), -1) for axis in pixels]
        return torch.stack((seconds.flatten() / rates, *rows), dim=1)


class _VideoBlock(LTX2VideoTransformerBlock):  # type: ignore[misc]
    def forward(
        self,
        states: Tensor,
        context: Tensor,
        modulation: Tensor,
        prompt: Tensor | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """States (batch, tokens, width) after attention to each other and to the text, and the feed-forward layers.

        modulation: (batch, 1 or frames, numbers · width); prompt: (batch, 1, 2 · width), that of the text.
        """
        tables = self.scale_shift_table
        parts = (tables + modulation.unflatten(-1, (len(tables), -1))).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts[:6]
        mixed = self.attn1(_modulated(self.norm1(states), shift, scale), query_rotary_emb=rotary)
        states = states + _gated(mixed, gate)
        query = self.norm2(states)
        if prompt is None:
            states = states + self.attn2(query, encoder_hidden_states=context)
        else:
            text_shift, text_scale = (self.prompt_scale_shift_table + prompt.unflatten(-1, (2, -1))).unbind(2)
            read = self.attn2(
                _modulated(query, *parts[6:8]), encoder_hidden_states=context * (1 + text_scale) + text_shift
            )
            states = states + _gated(read, parts[8])
        return states + _gated(self.ff(_modulated(self.norm3(states), ff_shift, ff_scale)), ff_gate)


def _modulated(states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """States (batch, tokens, width) scaled and shifted by (batch, 1 or frames, width)."""
    by_frame: Tensor = states.unflatten(1, (scale.shape[1], -1))
    return (by_frame * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def _gated(states: Tensor, gate: Tensor) -> Tensor:
    by_frame: Tensor = states.unflatten(1, (gate.shape[1], -1))
    return (by_frame * gate[:, :, None]).flatten(1, 2)


class _Connectors(nn.Module):
    """diffusers' part `connectors`, of which the network has the one for video."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        of_video = {
            name.removeprefix("video_connector_"): value
            for name, value in settings.items()
            if name.startswith("video_connector_")
        }
        shared = {
            name: settings[name] for name in ("rope_theta", "rope_double_precision", "rope_type") if name in settings
        }
        self.video_connector = LTX2ConnectorTransformer1d(
            **of_video,
            **shared,
            rope_base_seq_len=settings.get("connector_rope_base_seq_len", 4096),
            gated_attention=settings.get("video_gated_attn", False),
        )

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Rows for the network to attend to, at least 1024, those behind the text being registers.

        text: (batch, tokens, width); mask: bool (batch, tokens), False behind the end of a shorter text.
        """
        connector = self.video_connector
        registers = connector.learnable_registers
        count, tokens = len(registers), text.shape[1]
        rows = count * math.ceil(max(_ROWS, tokens) / count)
        filling = registers.repeat(rows // count, 1).to(text.dtype)
        behind = filling[tokens:].expand(len(text), -1, -1)
        if mask is not None:
            text = torch.where(mask[:, :, None], text, filling[:tokens])
        states = torch.cat((text, behind), dim=1)
        rotary = connector.rope(len(text), rows, device=text.device)
        for block in connector.transformer_blocks:
            states = block(states, rotary_emb=rotary)
        found: Tensor = connector.norm_out(states)
        return found
