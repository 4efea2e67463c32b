"""The random models that golden files were recorded on: the published shapes, and the same weights as then."""

from __future__ import annotations

import json
import math
from pathlib import Path

import models
import pytest
import torch
from safetensors import safe_open

from lorasmith.families import loading  # noqa: F401  (registers the families)
from lorasmith.families.base import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden"

PUBLISHED = {
    "Stable Diffusion 1.5": (models.SD1_FULL, 686, 859_520_964),
    "Stable Diffusion XL": (models.SDXL_FULL, 1680, 2_567_463_684),
    "Flux.1 dev": (models.FluxShape(3072, 19, 38, 4096, 768), 780, 11_901_408_320),
}


@pytest.mark.parametrize(("shape", "tensors", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_shapes_are_those_of_the_published_checkpoint(shape, tensors, parameters):
    sizes = dict(shape.tensors())
    assert len(sizes) == tensors
    assert sum(math.prod(size) for size in sizes.values()) == parameters


# Sizes of sd3.5_medium.safetensors and sd3.5_large.safetensors in units of 100 MB; both hold the autoencoder.
PUBLISHED_SD3 = {
    "medium": ({"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}, 384, 13, 51),
    "large": ({}, 192, 0, 165),
}
AUTOENCODER_BYTES = 2 * 83_819_683


@pytest.mark.parametrize(("config", "positions", "dual", "size"), PUBLISHED_SD3.values(), ids=PUBLISHED_SD3)
def test_stable_diffusion_3_has_the_published_size(config, positions, dual, size):
    denoiser = FAMILIES["sd3"].released_denoiser(
        **config, pos_embed_max_size=positions, dual_attention_layers=tuple(range(dual))
    )
    numbers = sum(tensor.numel() for tensor in denoiser.state_dict().values())
    assert round((2 * numbers + AUTOENCODER_BYTES) / 1e8) == size


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("comfyui_sd1_training", models.SD1_TINY),
        ("comfyui_sdxl_training", models.SDXL_SMALL),
        ("comfyui_flux_training", models.FLUX_TINY),
    ],
    ids=["sd1", "sdxl", "flux"],
)
def test_the_model_of_a_golden_file_can_be_rebuilt(file, shape):
    with safe_open(str(GOLDEN / f"{file}.safetensors"), "pt") as golden:
        metadata = golden.metadata()
    rebuilt = models.checkpoint(shape, json.loads(metadata["seeds"])["weights"])
    assert models.digest(rebuilt) == metadata["model_digest"]


def test_a_seeded_tensor_has_the_mean_and_spread_asked_for():
    values = models.seeded("any", (200, 500), seed=3, std=0.4, mean=1.0)
    torch.testing.assert_close(values.mean().item(), 1.0, rtol=0, atol=0.01)
    torch.testing.assert_close(values.std().item(), 0.4, rtol=0.01, atol=0)
    assert not torch.equal(values, models.seeded("other", (200, 500), seed=3, std=0.4, mean=1.0))


def test_a_fingerprint_tells_a_transposed_tensor_apart():
    tensor = models.seeded("any", (6, 6), seed=0)
    one, other = models.fingerprint("key", tensor), models.fingerprint("key", tensor.T)
    assert one[0] == pytest.approx(other[0])
    assert not torch.allclose(one[1:], other[1:])
