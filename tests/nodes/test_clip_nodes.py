"""Clips through nodes: encoded, sampled, decoded and saved, and the training graph of a list of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny_clips import clip_model
from tiny_parts import randomized
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.forms import LatentFormat
from lorasmith.families.model import Autoencoder, Model
from lorasmith.nodes.values import check_latents

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    from diffusers import AutoencoderKLQwenImage

    return Autoencoder(randomized(AutoencoderKLQwenImage(base_dim=8)), "wan21", "tiny")


def test_a_batch_is_a_clip_for_a_vae_of_videos(bench: Any, vae: Autoencoder, pictures: Make) -> None:
    frames = pictures(7, 16, 24)
    latent = bench.one("VAEEncode", pixels=frames, vae=vae)["samples"]
    assert latent.shape == (1, 16, 2, 2, 3)
    (said,) = bench.messages("warning")
    assert "a batch of 7 pictures is one clip for this VAE, of which 5 are encoded" in said
    expected = vae.encode(frames[:5].permute(3, 0, 1, 2)[None] * 2 - 1)
    torch.testing.assert_close(latent, expected)
    two = {"samples": torch.cat((latent, latent.flip(-1)))}
    decoded = bench.one("VAEDecode", samples=two, vae=vae)
    assert decoded.shape == (10, 16, 24, 3)
    torch.testing.assert_close(decoded[:5], (vae.decode_frames(latent)[0].permute(1, 2, 3, 0) / 2 + 0.5))
    assert bench.one("VAEDecodeTiled", samples=two, vae=vae).shape == decoded.shape


def test_each_batch_of_a_list_is_a_clip_of_a_data_set(
    bench: Any, vae: Autoencoder, pictures: Make, tiny: Model
) -> None:
    lists = {"images": [pictures(5, 16, 16), pictures(1, 16, 16), pictures(9, 16, 16)], "texts": ["a", "b", "c"]}
    latents, captions = bench.call("MakeTrainingDataset", lists=lists, vae=vae, clip=tiny.text_encoder).outputs
    assert [tuple(one["samples"].shape[:3]) for one in latents] == [(1, 16, 2), (1, 16, 1), (1, 16, 3)]
    assert [one[0].text for one in captions] == ["a", "b", "c"]


def test_clips_are_not_for_models_of_pictures(vae: Autoencoder) -> None:
    with pytest.raises(DataError, match=r"of pictures, one frame each, got 2 frames; encode pictures as a list"):
        check_latents(torch.zeros(1, 16, 2, 4, 4), LatentFormat(16, 8, 1.0, frames=True))
    check_latents(torch.zeros(1, 16, 2, 4, 4), vae.latent)


def test_a_batch_is_saved_as_an_animation_with_its_workflow(bench: Any, pictures: Make) -> None:
    frames: Tensor = pictures(4)
    result = bench.call("SaveAnimatedWEBP", images=frames, filename_prefix="clips/a", fps=8.0, method="fastest")
    assert result.outputs[0][0] is frames
    assert result.ui == {
        "images": [{"filename": "a_00001_.webp", "subfolder": "clips", "type": "output"}],
        "animated": [True],
    }
    with Image.open(bench.folders.base / "output" / "clips" / "a_00001_.webp") as saved:
        assert saved.n_frames == 4  # type: ignore[attr-defined]
        exif = saved.getexif()
        saved.seek(3)
        assert np.array_equal(np.array(saved.convert("RGB")), (frames[3] * 255).round().numpy())
    assert json.loads(exif[ExifTags.Base.Model].removeprefix("prompt:")) == bench.context.prompt
    assert json.loads(exif[ExifTags.Base.Make].removeprefix("workflow:")) == bench.context.workflow


@pytest.mark.slow
def test_clips_are_sampled_as_the_frames_of_empty_latents(bench: Any, tmp_path: Any) -> None:
    model = clip_model(tmp_path)
    prompt = [model.text_encoder.encode("a wave")]
    empty = bench.one("EmptyHunyuanLatentVideo", width=32, height=48, length=9)
    given = {"model": model.denoiser, "positive": prompt, "negative": prompt, "latent_image": empty}
    drawn = bench.one("KSampler", **given, seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple")
    assert drawn["samples"].shape == (1, 16, 3, 6, 4)
    assert bench.one("VAEDecode", samples=drawn, vae=model.autoencoder).shape == (9, 48, 32, 3)
    losses = bench.call(
        "TrainLoraNode", model=model.denoiser, latents=drawn, positive=prompt, steps=2, targets="attention", rank=2
    ).outputs[1][0]
    assert len(losses["loss"]) == 2
