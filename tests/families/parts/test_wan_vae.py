"""Clips in Wan's autoencoders, against diffusers' own calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_parts import randomized

from lorasmith.families.model import Autoencoder


def _modules() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

    deeper = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=8, in_channels=12, out_channels=12, patch_size=2, is_residual=True,
        scale_factor_spatial=16,
    )  # fmt: skip
    return {"wan21": AutoencoderKLQwenImage(base_dim=8), "wan22": deeper}


@pytest.mark.parametrize("kind", ["wan21", "wan22"])
def test_clips_are_encoded_and_decoded_as_by_diffusers(kind: str) -> None:
    module = randomized(_modules()[kind])
    vae = Autoencoder(module, kind, "tiny")
    assert vae.latent.time_downscale == 4
    clip = torch.rand(1, 3, 5, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(clip)
    assert latents.shape == (1, *vae.latent.shape(32, 64, 5))
    with torch.no_grad():
        torch.testing.assert_close(latents, module.encode(clip).latent_dist.mean)  # type: ignore[operator]
        expected = module.decode(latents).sample.clamp(-1, 1)  # type: ignore[operator]
    frames = vae.decode_frames(latents)
    assert frames.shape == clip.shape
    torch.testing.assert_close(frames, expected)
    # The first frame does not depend on those after it.
    torch.testing.assert_close(vae.decode(latents), frames[:, :, 0])
    torch.testing.assert_close(vae.encode(clip[:, :, 0]), latents[:, :, :1])
