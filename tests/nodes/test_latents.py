from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_cases import REBATCH, samples
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.model import Model
from lorasmith.workflow.execution_events import NodeProgress

Make = Callable[..., Any]


def test_encoding_is_unscaled_and_decoding_goes_back(bench: Any, tiny: Model, pictures: Make) -> None:
    image = pictures(2)
    latent = bench.one("VAEEncode", pixels=image, vae=tiny.autoencoder)
    vae = tiny.components.vae
    with torch.no_grad():
        expected = vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mean
    torch.testing.assert_close(latent["samples"], expected, atol=1e-4, rtol=1e-4)
    decoded = bench.one("VAEDecode", samples=latent, vae=tiny.autoencoder)
    assert decoded.shape == image.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert (decoded - image).abs().mean() < 0.1


def test_edges_that_make_no_whole_latent_are_cut_from_both_sides(bench: Any, tiny: Model, pictures: Make) -> None:
    image = pictures(1, 66, 67)
    latent = bench.one("VAEEncode", pixels=image, vae=tiny.autoencoder)
    inner = bench.one("VAEEncode", pixels=image[:, 1:65, 1:65], vae=tiny.autoencoder)
    assert torch.equal(latent["samples"], inner["samples"])


def test_pictures_and_latents_that_do_not_fit_are_refused(bench: Any, tiny: Model) -> None:
    with pytest.raises(DataError, match=r"at least 4×4 px here, got 3×9"):
        bench.call("VAEEncode", pixels=torch.zeros(1, 9, 3, 3), vae=tiny.autoencoder)
    with pytest.raises(DataError, match=r"\(batch, 4, height, width\).*got \(1, 16, 8, 8\)"):
        bench.call("VAEDecode", samples={"samples": torch.zeros(1, 16, 8, 8)}, vae=tiny.autoencoder)


def test_empty_latents_count_eight_pixels_each(bench: Any) -> None:
    latent = bench.one("EmptyLatentImage", width=64, height=128, batch_size=3)
    assert latent["samples"].shape == (3, 4, 16, 8)
    assert not latent["samples"].any()


def test_empty_latents_of_other_models_have_their_shapes(bench: Any) -> None:
    sizes = {"width": 64, "height": 128, "batch_size": 2}
    assert bench.one("EmptySD3LatentImage", **sizes)["samples"].shape == (2, 16, 16, 8)
    assert bench.one("EmptyFlux2LatentImage", **sizes)["samples"].shape == (2, 128, 8, 4)
    assert bench.one("EmptyHunyuanLatentVideo", **sizes, length=25)["samples"].shape == (2, 16, 7, 16, 8)


def test_tiles_make_the_same_picture(bench: Any, tiny: Model, pictures: Make) -> None:
    latent = bench.one("VAEEncode", pixels=pictures(2, 96, 128), vae=tiny.autoencoder)
    whole = bench.one("VAEDecode", samples=latent, vae=tiny.autoencoder)
    one_tile = bench.one("VAEDecodeTiled", samples=latent, vae=tiny.autoencoder, tile_size=128)
    torch.testing.assert_close(one_tile, whole, atol=1e-5, rtol=1e-5)
    tiled = bench.one("VAEDecodeTiled", samples=latent, vae=tiny.autoencoder, tile_size=64, overlap=64)
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.06  # groups are normalized within a tile
    assert [(e.value, e.maximum) for e in bench.events if isinstance(e, NodeProgress)][-1] == (5, 6)


def test_batches_are_joined_and_repeated_in_order(bench: Any, latents: Callable[..., dict[str, Tensor]]) -> None:
    first, second = latents(2), latents(1, seed=1)
    both = bench.one("LatentBatch", samples1=first, samples2=second)["samples"]
    assert torch.equal(both, torch.cat((first["samples"], second["samples"])))
    repeated = bench.one("RepeatLatentBatch", samples=first, amount=3)["samples"]
    assert torch.equal(repeated, torch.cat([first["samples"]] * 3))
    assert bench.messages("warning") == []


def test_a_batch_of_several_sizes_says_what_it_scales(bench: Any, latents: Make) -> None:
    both = bench.one("LatentBatch", samples1=latents(), samples2=latents(1, 8, 32))["samples"]
    assert both.shape == (2, 4, 16, 16)
    assert "32×8 were scaled to 16×16" in bench.messages("warning")[0]


@pytest.mark.parametrize("size", REBATCH)
def test_batches_are_joined_and_split_as_in_comfyui(bench: Any, size: int) -> None:
    golden = load_file(Path(__file__).parents[1] / "golden" / "comfyui_dataset_nodes.safetensors")
    lists = {"latents": [{"samples": one} for one in samples()]}
    (made,) = bench.call("RebatchLatents", lists=lists, batch_size=size).outputs
    count = sum(name.startswith(f"RebatchLatents-{size}.") for name in golden)
    assert len(made) == count
    for number, one in enumerate(made):
        assert torch.equal(one["samples"], golden[f"RebatchLatents-{size}.{number}"])


def test_pixels_per_latent_stay_where_all_batches_have_them(bench: Any, latents: Make) -> None:
    empty = {**latents(3), "downscale_ratio_spacial": 8}
    (made,) = bench.call("RebatchLatents", latents=empty, batch_size=2).outputs
    assert [one["downscale_ratio_spacial"] for one in made] == [8, 8]
    (made,) = bench.call("RebatchLatents", lists={"latents": [empty, latents(1)]}, batch_size=9).outputs
    assert [one.keys() for one in made] == [{"samples"}]
