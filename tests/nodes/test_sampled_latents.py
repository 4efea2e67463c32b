"""Latents of any origin are fitted to the model that samples them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasmith.core.errors import DataError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import LatentFormat
from lorasmith.families.model import Denoiser, Model
from lorasmith.nodes.sampling import Guider, Noise, sampled

FORMATS = {
    "16 channels": LatentFormat(16, 8, 0.36, 0.12),
    "128 channels": LatentFormat(128, 16, 1.0),
    "a frame axis": LatentFormat(16, 8, (0.5,) * 16, (0.1,) * 16, frames=True),
}
EMPTY = ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage", "EmptyHunyuanLatentVideo")


def denoiser_of(tiny: Model, form: LatentFormat) -> Denoiser:
    return replace(tiny, components=replace(tiny.components, latent=form)).denoiser


@pytest.mark.parametrize("node", EMPTY)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_any_empty_latents_fit_any_model(
    bench: Any, tiny: Model, captions: list[Conditioning], node: str, form: LatentFormat
) -> None:
    sizes = {"width": 256, "height": 128, "batch_size": 2}
    empty = bench.one(node, **sizes, **({"length": 1} if "Video" in node else {}))
    guider = Guider(denoiser_of(tiny, form), captions[:1])
    # Without steps the network, which has other channels, is not asked.
    result, _ = sampled(bench.context, guider, empty, Noise(0), sampler="euler", sigmas=torch.empty(0))
    assert result["samples"].shape == (2, *form.shape(128, 256))
    assert not result["samples"].any()
    assert bench.messages("warning") == []


def test_of_several_frames_one_is_sampled_with_a_word(bench: Any, tiny: Model, captions: list[Conditioning]) -> None:
    guider = Guider(denoiser_of(tiny, FORMATS["a frame axis"]), captions[:1])
    empty = bench.one("EmptyHunyuanLatentVideo", width=64, height=64)
    result, _ = sampled(bench.context, guider, empty, Noise(0), sampler="euler", sigmas=torch.empty(0))
    assert result["samples"].shape == (1, 16, 1, 8, 8)
    (warning,) = bench.messages("warning")
    assert "7 frames" in warning
    assert "set length to 1" in warning


def test_latents_of_pictures_get_a_frame_axis_or_are_refused(
    bench: Any, tiny: Model, captions: list[Conditioning]
) -> None:
    def fitted(form: str, samples: torch.Tensor) -> torch.Tensor:
        guider = Guider(denoiser_of(tiny, FORMATS[form]), captions[:1])
        latent = {"samples": samples}
        return sampled(bench.context, guider, latent, Noise(0), sampler="euler", sigmas=torch.empty(0))[0]["samples"]

    assert fitted("a frame axis", torch.ones(1, 16, 8, 8)).shape == (1, 16, 1, 8, 8)
    with pytest.raises(DataError, match=r"must be \(batch, 16, height, width\).*got \(1, 16, 1, 8, 8\)"):
        fitted("16 channels", torch.ones(1, 16, 1, 8, 8))


def test_noise_is_that_of_its_seed_or_none() -> None:
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(Noise(7).of_shape((1, 2, 3)), torch.randn(1, 2, 3, generator=generator))
    assert not Noise(7, is_empty=True).of_shape((1, 2, 3)).any()
