"""LTX-2's network of video alone, against diffusers' transformer and connectors, whose sound is left out."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors, per_layer_masked_mean_norm
from tiny_parts import randomized
from torch import Tensor

from lorasmith.families.parts.ltx2_network import LTX2Video

TOKENS = (5, 9)
FRAMES, HEIGHT, WIDTH = 3, 2, 4
GEMMA, LAYERS, WIDE = 24, 3, 64


def settings(*, is_newer: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations of transformer and connectors, small, of 2.3 or 2.0."""
    transformer = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "cross_attention_dim": WIDE,
        "caption_channels": GEMMA,
        "rope_type": "split",
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "use_prompt_embeddings": not is_newer,
        **dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), is_newer),
        "perturbed_attn": is_newer,
    }
    width, of_sound = (WIDE, 16) if is_newer else (GEMMA, GEMMA)
    connectors = {
        "caption_channels": GEMMA,
        "text_proj_in_factor": LAYERS,
        "rope_type": "split",
        "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": width // 4,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": of_sound // 4,
        "video_gated_attn": is_newer,
        "audio_gated_attn": is_newer,
        "per_modality_projections": is_newer,
        "video_hidden_dim": WIDE,
        "audio_hidden_dim": 16,
        "proj_bias": is_newer,
    }
    return transformer, connectors


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1], ids=["from noise", "from a first frame"])
@pytest.mark.parametrize("is_newer", [True, False], ids=["2.3", "2.0"])
def test_clips_without_sound_are_predicted_as_by_diffusers(is_newer: bool, given: int) -> None:
    transformer, connectors = settings(is_newer=is_newer)
    network: Any = randomized(LTX2VideoTransformer3DModel(**transformer))
    connect: Any = randomized(LTX2TextConnectors(**connectors))
    ours = LTX2Video.from_config({**network.config, "connectors": dict(connect.config)})
    tensors = network.state_dict() | {f"connectors.{name}": one for name, one in connect.state_dict().items()}
    ours.load_state_dict({name: tensors[name] for name in ours.state_dict()})
    left_out = {name for name in tensors if name not in ours.state_dict() and "audio" not in name}
    assert all("_a2v_" in name or "text_proj_in" in name or "av_cross_attn" in name for name in left_out)

    latents = models.seeded("latents", (2, 8, FRAMES, HEIGHT, WIDTH), seed=0)
    times = torch.tensor([300.0, 900.0])
    by_token = times if not given else times[:, None].repeat(1, FRAMES * HEIGHT * WIDTH)
    if given:
        by_token[:, : HEIGHT * WIDTH] = 0
    states = models.seeded("states", (2, 1024, GEMMA, LAYERS), seed=0)
    mask = torch.arange(1023, -1, -1) < torch.tensor(TOKENS)[:, None]  # the pipeline fills up on the left
    of_video, of_sound, _ = connect(states, mask.long())
    theirs = network(
        *(latents.flatten(2).transpose(1, 2), torch.zeros(2, 1, 4), of_video, of_sound),
        timestep=by_token,
        sigma=times,
        audio_timestep=times,
        audio_sigma=times,
        fps=25.0,
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        audio_num_frames=1,
        isolate_modalities=True,
    ).sample

    projected = projection(connect, states, mask, is_newer=is_newer)
    text, attended = torch.zeros(2, max(TOKENS), projected.shape[-1]), torch.zeros(2, max(TOKENS), dtype=torch.bool)
    for row, count in enumerate(TOKENS):
        text[row, :count], attended[row, :count] = projected[row, -count:], True
    found = ours(latents, times, text, torch.tensor([25.0, 25.0]), attended, given)
    expected = theirs.transpose(1, 2).reshape(latents.shape)
    assert (found - expected).norm() / expected.norm() <= 1e-6


def projection(connectors: Any, states: Tensor, mask: Tensor, *, is_newer: bool) -> Tensor:
    """What the connectors of diffusers project states (batch, tokens, width, layers) to."""
    if not is_newer:
        return connectors.text_proj_in(per_layer_masked_mean_norm(states, mask.sum(-1), "cpu"))  # type: ignore[no-any-return]
    normed = states * torch.rsqrt(states.pow(2).mean(2, keepdim=True) + 1e-6)
    return connectors.video_text_proj_in(normed.flatten(2) * (WIDE / GEMMA) ** 0.5)  # type: ignore[no-any-return]


@torch.no_grad()
def test_positions_are_seconds_by_the_frame_rate_of_each_clip() -> None:
    transformer, connectors = settings(is_newer=True)
    network = randomized(LTX2Video(**transformer, connectors=connectors))
    latents, time = models.seeded("latents", (1, 8, 3, 2, 2), seed=0), torch.tensor([500.0])
    text = models.seeded("text", (1, 4, WIDE), seed=0)
    alone = [network(latents, time, text, torch.tensor([rate])) for rate in (24.0, 50.0)]
    both = network(*(one.expand(2, *one.shape[1:]) for one in (latents, time, text)), torch.tensor([24.0, 50.0]))
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert (alone[0] - alone[1]).norm() > 1e-3 * alone[0].norm()
