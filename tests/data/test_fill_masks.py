"""Masks of pictures as Flux.1 Fill is given them: what is known, what is painted, and pictures without a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import fill_files
from PIL import Image
from torch import Tensor
from transformer_models import TINY

from lorasmith.core.errors import DataError
from lorasmith.data.encoding import load_dataset
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return TINY["flux1"].loaded(fill_files(tmp_path_factory.mktemp("fill")))


def masked(folder: Path, name: str, mask: np.ndarray | None) -> np.ndarray:
    pixels = np.random.default_rng(len(name)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("a cat")
    if mask is not None:
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.mask.png")
    return pixels


def corner() -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[5:40, 20:] = True
    return mask


def expected(model: Model, pixels: np.ndarray, mask: np.ndarray) -> Tensor:
    """What is known: latents of the picture with grey inside of the mask, and the pixels of the mask, by hand."""
    shown = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    inside = torch.from_numpy(mask).float()
    latents = model.components.latent.to_model(model.autoencoder.encode(shown * (1 - inside)))
    folded = torch.stack([inside[y::8, x::8] for y in range(8) for x in range(8)])
    return torch.cat((latents, folded[None]), dim=1)


def test_a_mask_is_what_is_painted_and_mirrored_with_its_picture(tmp_path: Path, fill: Model) -> None:
    pixels = masked(tmp_path, "a", corner())
    for _ in range(2):  # the second time from the cache
        (sample,) = load_dataset(tmp_path, fill, resolution=64, masks="files", flip=True)
        assert sample.variants is not None
        straight, flipped = sample.variants.pictures
        wanted = expected(fill, pixels, corner())
        torch.testing.assert_close(straight.inputs["known"], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(sample.conditioning.tensors["known"], straight.inputs["known"])
        mirrored = expected(fill, pixels[:, ::-1].copy(), corner()[:, ::-1].copy())
        torch.testing.assert_close(flipped.inputs["known"], mirrored, rtol=1e-4, atol=1e-4)
        assert sample.places is not None and sample.places.max() > 1 and sample.places.min() == 0


def test_the_loss_outside_of_the_mask_is_a_setting(tmp_path: Path, fill: Model) -> None:
    masked(tmp_path, "a", corner())
    (sample,) = load_dataset(tmp_path, fill, resolution=64, masks="files", mask_outside=1.0)
    assert sample.places is not None and torch.allclose(sample.places, torch.ones(8, 8))


def test_pictures_without_a_mask_are_an_error_or_painted_as_a_whole(tmp_path: Path, fill: Model) -> None:
    masked(tmp_path, "a", corner())
    pixels = masked(tmp_path, "bb", None)
    with pytest.raises(
        DataError, match=r"\(Flux.1\) paints what a mask covers, but there is none for bb.png; add NAME.mask.png .* or"
    ):
        load_dataset(tmp_path, fill, resolution=64, masks="files")
    with pytest.raises(DataError, match=r"is none for a.png, bb.png; .* --masks files, or choose controls optional"):
        load_dataset(tmp_path, fill, resolution=64)
    with pytest.raises(DataError, match=r"from what is around it, which transparency hides; choose --masks files$"):
        load_dataset(tmp_path, fill, resolution=64, masks="alpha")
    (_, whole) = load_dataset(tmp_path, fill, resolution=64, masks="files", controls="optional")
    everything = expected(fill, pixels, np.ones((64, 64), bool))
    torch.testing.assert_close(whole.conditioning.tensors["known"], everything, rtol=1e-4, atol=1e-4)
    assert whole.places is None


def test_masks_that_cover_nothing_or_everything_are_said(tmp_path: Path, fill: Model) -> None:
    masked(tmp_path, "a", np.zeros((64, 64), bool))
    masked(tmp_path, "bb", np.ones((64, 64), bool))
    data = load_dataset(tmp_path, fill, resolution=64, masks="files")
    assert [note for note in data.notes if "mask" in note] == [
        "the mask of a.png leaves nothing of its 64×64 crop inside, so that is trained as a whole; correct the mask, "
        "or remove it",
        "the mask of bb.png covers all of its 64×64 crop, so that the model is given nothing of it; correct the "
        "mask, unless whole pictures are meant",
    ]
    for sample in data:
        assert sample.conditioning.tensors["known"][:, 16:].min() == 1


def test_draws_may_be_without_the_picture(tmp_path: Path, fill: Model) -> None:
    masked(tmp_path, "a", corner())
    (sample,) = load_dataset(tmp_path, fill, resolution=64, masks="files", control_dropout=0.5)
    given = ["known" in sample.drawn(0, draw).conditioning.tensors for draw in range(40)]
    assert 10 < sum(given) < 30
    (plain,) = load_dataset(tmp_path, fill, resolution=64, masks="files", controls="none")
    assert "known" not in plain.conditioning.tensors and plain.places is not None


def test_controls_beside_the_pictures_are_refused(tmp_path: Path, fill: Model) -> None:
    masked(tmp_path, "a", corner())
    (tmp_path / "control").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "control" / "a.png")
    with pytest.raises(DataError, match=r"\(Flux.1\) takes .* a.png has .*; choose controls none to train without"):
        load_dataset(tmp_path, fill, resolution=64, masks="files")


def test_its_tensors_tell_it_whatever_its_name_is(tmp_path: Path, fill: Model) -> None:
    assert fill.path is not None
    renamed = load_model(fill.path.rename(fill.path.with_name("kontext.safetensors")))
    assert renamed.control_form.source == "mask"
    renamed.path and renamed.path.rename(fill.path)
