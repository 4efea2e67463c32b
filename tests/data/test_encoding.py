from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data import encoding
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import Sample
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import scan_folder, scan_sources
from lorasmith.families.model import Autoencoder, Model, TextEncoder
from tests.data.encoder_cases import Encoder, add, three_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_pictures(tmp_path)


def test_encodes_images_at_their_buckets(folder: Path) -> None:
    encoder = Encoder()
    dataset = encoder.encode(folder)
    assert encoder.shapes == [(1, 3, 64, 64), (1, 3, 48, 80), (1, 3, 80, 48)]
    assert [sample.name for sample in dataset.samples] == ["1.png", "2.png", "3.png"]
    assert [tuple(sample.latents.shape) for sample in dataset.samples] == [(3, 16, 16), (3, 12, 20), (3, 20, 12)]
    assert all(sample.latents.dtype == torch.float32 for sample in dataset.samples)
    assert dataset.samples[0].latents.eq(1).all() and dataset.samples[1].latents.eq(-1).all()
    red = torch.tensor([1.0, -1.0, -1.0])
    assert torch.equal(dataset.samples[2].latents.mean((1, 2)), red)


def test_identical_captions_are_encoded_once(folder: Path) -> None:
    encoder = Encoder()
    samples = encoder.encode(folder).samples
    assert encoder.texts == ["a dog", "a cat"]
    assert [sample.conditioning.text for sample in samples] == ["a dog", "a cat", "a dog"]
    assert samples[0].conditioning is samples[2].conditioning


def test_repeats_stand_in_the_dataset_but_are_encoded_once(folder: Path) -> None:
    (folder / "3_x").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "3_x" / "4.png")
    encoder = Encoder()
    dataset = encoder.encode(folder)
    assert [sample.name for sample in dataset.samples] == ["1.png", "2.png", "3.png", "4.png", "4.png", "4.png"]
    assert len(dataset) == 6 and len(encoder.shapes) == 4
    assert dataset.samples[3].latents is dataset.samples[5].latents


def test_no_upscaling(folder: Path) -> None:
    encoder = Encoder()
    encoder.encode(folder, resolution=512, multiple=32, upscale=False)
    assert encoder.shapes == [(1, 3, 96, 96), (1, 3, 96, 192), (1, 3, 96, 32)]


def test_progress(folder: Path) -> None:
    calls = []
    Encoder().encode(folder, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, "1.png", 0), (2, 3, "2.png", 0), (3, 3, "3.png", 0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_image(folder: Path, bad: float) -> None:
    encoder = Encoder()

    plain = encoder.image

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        latents = plain(pixels)
        if len(encoder.shapes) == 2:
            latents[0, 1, 2, 3] = bad
        return latents

    encoder.image = encode_image  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"latents must be finite, got NaN or infinity for 2\.png; encode in fp32 or"):
        encoder.encode(folder)
    assert len(encoder.shapes) == 2, "it stops at once"


def test_an_image_that_disappeared(folder: Path) -> None:
    scan = scan_folder(folder)
    (folder / "2.png").unlink()
    encoder = Encoder()
    with pytest.raises(DataError, match=r"2\.png does not exist"):
        encoder.encode(scan)


def test_captions_that_are_all_dropped_are_named(folder: Path) -> None:
    (note,) = Encoder().encode(folder, caption_dropout=1.0, trigger="sks").notes
    assert note.startswith("caption_dropout 1 empties the text of every draw, so that neither trigger nor captions are")
    assert not any("caption_dropout" in one for one in Encoder().encode(folder, caption_dropout=0.9).notes)


def test_digests_tell_images_captions_and_sizes_apart_and_nothing_else(folder: Path) -> None:
    def digests(**options: int) -> list[str]:
        return [sample.digest for sample in Encoder().encode(folder, **options).samples]

    before = digests()
    assert len(set(before)) == 3
    assert digests() == before
    assert not set(digests(resolution=32)) & set(before)
    (folder / "1.txt").write_text("a fox")
    Image.new("RGB", (200, 100), "blue").save(folder / "2.png")
    assert [new == old for new, old in zip(digests(), before, strict=True)] == [False, False, True]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    return tmp_path


def test_both_encoders_work_on_the_device_that_is_named(
    single: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for kind in (TextEncoder, Autoencoder):

        def listen(
            self: object, device: torch.device | None = None, active: object = kind.active, **given: bool
        ) -> object:
            seen.append((type(self), device))
            return active(self, device, **given)  # type: ignore[operator]

        monkeypatch.setattr(kind, "active", listen)
    load_dataset(single, tiny, resolution=64, device="cpu", cache=False)
    assert seen == [(TextEncoder, torch.device("cpu")), (Autoencoder, torch.device("cpu"))]


def test_a_device_that_is_not_here_is_refused(single: Path, tiny: Model) -> None:
    with pytest.raises(OptionError, match="device must be one that is here"):
        load_dataset(single, tiny, device="gpu")


def test_framings_and_captions_vary_as_draws_do(folder: Path) -> None:
    encoder = Encoder()
    data = encoder.encode(folder, flip=True, crop_jitter=0.2, picture_variants=3, caption_dropout=0.5)
    assert len(encoder.shapes) == 3 * 3 * 2 and encoder.texts == ["a dog", "a cat"]
    sample = data.samples[0]
    assert sample.variants is not None and len(sample.variants.pictures) == 6
    drawn = [sample.drawn(seed=1, draw=draw) for draw in range(200)]
    assert [one.conditioning.text for one in drawn].count("") in range(70, 130)
    assert {one.conditioning.text for one in drawn} == {"", "a dog"}
    assert all(one.variants is None and one.name == "1.png" for one in drawn)
    again = [sample.drawn(seed=1, draw=draw) for draw in reversed(range(200))][::-1]
    assert all(a.latents is b.latents for a, b in zip(drawn, again, strict=True))
    assert any(a.latents is not sample.drawn(seed=2, draw=n).latents for n, a in enumerate(drawn))
    assert len({id(one.latents) for one in drawn}) == 6


def test_each_resolution_is_drawn(folder: Path) -> None:
    sample = Encoder().encode(folder, more_resolutions="32").samples[1]
    assert {tuple(sample.drawn(0, draw).latents.shape) for draw in range(50)} == {(3, 12, 20), (3, 4, 12)}
    assert [tuple(one.latents.shape) for one in sample.sizes()] == [(3, 12, 20), (3, 4, 12)]


def test_masks_become_weights_of_the_loss(tmp_path: Path) -> None:
    add(tmp_path, "1.png", (64, 64), (255, 0, 0))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "1.mask.png")
    add(tmp_path, "2.png", (64, 64), (0, 255, 0))
    Image.new("L", (64, 64)).save(tmp_path / "2.mask.png")
    data = Encoder().encode(tmp_path, masks="files", mask_outside=0.25, mask_normalize=False)
    places = data.samples[0].places
    assert places is not None and places[:, :8].eq(1).all() and places[:, 8:].eq(0.25).all()
    assert data.samples[1].places is not None and data.samples[1].places.eq(0.25).all()
    data = Encoder().encode(tmp_path, masks="files")
    assert data.samples[0].places.mean() == 1  # type: ignore[union-attr]
    assert data.samples[1].places is None
    (note,) = data.notes
    assert note.startswith("the mask of 2.png leaves nothing of its 64×64 crop inside, so that is trained as a whole")


def test_a_crop_follows_the_mask(tmp_path: Path) -> None:
    picture = Image.new("RGB", (192, 64), "red")
    picture.paste("blue", (128, 0, 192, 64))
    picture.save(tmp_path / "1.png")
    mask = Image.new("L", (192, 64))
    mask.paste(255, (128, 0, 192, 64))
    mask.save(tmp_path / "1.mask.png")
    (sample,) = Encoder().encode(tmp_path, masks="files", crop="mask", bucket_max=64).samples
    assert sample.latents[2].eq(1).all() and sample.latents[0].eq(-1).all()


def test_weights_of_sources_and_digests_that_tell_settings_apart(folder: Path) -> None:
    config = DataConfig()
    scan = scan_sources([ImageSource(str(folder), repeats=2, weight=0.5)], config)
    data = Encoder().encode(scan)
    assert len(data) == 6 and {sample.weight for sample in data.samples} == {0.5}
    digests = [
        Encoder().encode(folder, **settings).samples[0].digest
        for settings in (
            {},
            {"flip": True},
            {"crop": "random"},
            {"colour_jitter": 0.1},
            {"caption_dropout": 0.1},
            {"trigger": "x"},
            {"more_resolutions": "32"},
        )
    ]
    assert len({*digests, data.samples[0].digest}) == 8
    assert Encoder().encode(folder, caption_memory=1.0, cache_limit=1.0).samples[0].digest == digests[0]


def test_several_sources_and_datasets_are_loaded(folder: Path, tiny: Model, tmp_path: Path) -> None:
    more = tmp_path / "more"
    add(more, "4.png", (64, 64), (1, 2, 3), "a bus")
    data = load_dataset([ImageSource(str(folder), repeats=2), str(more)], tiny, resolution=32)
    assert [sample.name for sample in data.samples] == ["1.png", "1.png", "2.png", "2.png", "3.png", "3.png", "4.png"]


def test_a_dataset_object_is_loaded(folder: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    images = {"image": [str(folder / "1.png"), str(folder / "2.png")], "text": ["a dog", "a cat"]}
    found = load_dataset(
        datasets.Dataset.from_dict(images).cast_column("image", datasets.Image()), tiny, resolution=32, flip=True
    )
    assert [sample.conditioning.text for sample in found.samples] == ["a dog", "a cat"]


def test_pictures_are_encoded_in_bf16_where_the_device_has_units_for_it(
    tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "1.png", (64, 64), (200, 30, 90), "a dog")

    def encoded(**settings: str) -> Sample:
        return load_dataset(tmp_path, tiny, resolution=64, device="cpu", **settings).samples[0]

    plain = encoded()
    for has_units in (False, True):
        monkeypatch.setattr(
            encoding, "fast_dtype", lambda dtype, device, has_units=has_units: dtype if has_units else torch.float32
        )
        coarse = encoded(vae_dtype="bf16")
        assert torch.equal(coarse.latents, plain.latents) != has_units
        torch.testing.assert_close(coarse.latents, plain.latents, rtol=0.1, atol=0.1)
        assert coarse.digest != plain.digest
    assert torch.equal(encoded().latents, plain.latents), "each has its own entry of the cache"
