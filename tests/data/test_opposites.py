"""Pairs of pictures that are not for edit models: opposites are found, framed, cached and refused as controls are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformer_models import Case

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.controls import check_controls
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import scan_folder
from lorasmith.data.preflight import preflight
from lorasmith.families.model import Model

SIDE = 64


def pair_folder(root: Path, *, size: tuple[int, int] = (96, 64)) -> Path:
    """Two images, and their opposites in a folder beside."""
    random = np.random.default_rng(0)
    for place in (root / "high", root / "low"):
        place.mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
            (place / f"{number}.txt").write_text(f"a cat, number {number}")
    return root


def loaded(root: Path, model: Model, **settings: object) -> list[torch.Tensor]:
    config = {"control": str(root / "low"), "controls": "opposite", "resolution": SIDE, **settings}
    data = load_dataset(root / "high", model, **config, device="cpu")
    assert [one.conditioning.controls for one in data] == [()] * len(data)
    found = [one.opposite for one in data if one.opposite is not None]
    assert len(found) == len(data) == 2
    return found


def test_the_opposite_of_an_image_is_the_other_picture_of_its_name(tmp_path: Path, tiny: Model) -> None:
    root = pair_folder(tmp_path)
    alone = load_dataset(root / "low", tiny, resolution=SIDE, device="cpu")
    for cache in (True, True, False):
        for found, other in zip(loaded(root, tiny, cache=cache), alone, strict=True):
            assert torch.equal(found, other.latents)
    (root / "low").rename(root / "high" / "control")
    inside = load_dataset(root / "high", tiny, controls="opposite", resolution=SIDE, device="cpu")
    assert all(torch.equal(one.opposite, other.latents) for one, other in zip(inside, alone, strict=True))
    plain = load_dataset(root / "high", tiny, controls="none", resolution=SIDE, device="cpu")
    assert [one.opposite for one in plain] == [None, None]
    assert plain[0].digest != inside[0].digest
    Image.new("RGB", (96, 64)).save(root / "high" / "control" / "0.png")
    changed = load_dataset(root / "high", tiny, controls="opposite", resolution=SIDE, device="cpu")
    assert changed[0].digest != inside[0].digest
    assert changed[1].digest == inside[1].digest


def test_variants_of_a_pair_are_framed_and_drawn_alike(tmp_path: Path, tiny: Model) -> None:
    root = pair_folder(tmp_path)
    for name in ("0.png", "1.png"):
        (root / "low" / name).write_bytes((root / "high" / name).read_bytes())  # so that both are to stay equal
    varied = {"flip": True, "crop_jitter": 0.2, "colour_jitter": 0.2, "more_resolutions": "128"}
    data = load_dataset(
        root / "high", tiny, control=str(root / "low"), controls="opposite", resolution=SIDE, device="cpu", **varied
    )
    seen = set()
    for draw in range(12):
        one = data[0].drawn(3, draw)
        assert one.opposite is not None
        assert torch.equal(one.opposite, one.latents)
        seen.add(one.latents.numpy().tobytes())
    assert len(seen) > 4


def test_an_opposite_of_another_aspect_ratio_has_the_size_of_its_image(tmp_path: Path, tiny: Model) -> None:
    root = pair_folder(tmp_path)
    Image.new("RGB", (64, 128)).save(root / "low" / "0.png")
    first, second = loaded(root, tiny)
    assert first.shape == second.shape == load_dataset(root / "high", tiny, resolution=SIDE)[0].latents.shape


def test_pairs_are_given_as_pictures_in_memory(tiny: Model) -> None:
    white, black = (Image.new("RGB", (SIDE, SIDE), name) for name in ("white", "black"))
    rows = [{"image": white, "control": black, "text": "a cat"}, {"image": black, "control": white, "text": "a dog"}]
    data = load_dataset(rows, tiny, controls="opposite", resolution=SIDE, device="cpu")
    assert torch.equal(data[0].opposite, data[1].latents)
    assert torch.equal(data[1].opposite, data[0].latents)


def test_what_is_no_pair_is_refused_in_a_sentence(tmp_path: Path, tiny: Model) -> None:
    root = pair_folder(tmp_path)
    config = DataConfig(control=(str(root / "low"),), controls="opposite")

    def told(model: Model = tiny) -> str:
        with pytest.raises(DataError) as caught:
            check_controls(scan_folder(root / "high", config), config, model)
        return str(caught.value)

    check_controls(scan_folder(root / "high", config), config, tiny)
    kontext = Case.of("flux1", tmp_path / "flux").ours.as_edit("kontext")
    assert told(kontext).endswith("is given pictures beside a caption, and is not trained on pairs; leave pairs out")
    Image.new("RGB", (96, 64)).save(root / "low" / "0_2.png")
    assert told().startswith("all images need as many controls")
    Image.new("RGB", (96, 64)).save(root / "low" / "1_2.png")
    assert told() == "pairs are of two pictures, but 0.png has 2 controls; remove some"
    for name in ("0_2.png", "1_2.png", "1.png"):
        (root / "low" / name).unlink()
    assert told().startswith("each image needs a control, but there is none for 1.png; add a file of the same name")
    assert told().endswith("or leave pairs out")
    (root / "low" / "1.png").write_bytes(b"no picture")
    assert told().endswith("or leave pairs out")
    for settings in ({"control_dropout": 0.5}, {"class_prompt": "a dog"}, {"class_images": "dogs"}):
        with pytest.raises(OptionError, match=r"controls opposite needs a pair for each draw, got .*; leave both out"):
            DataConfig(controls="opposite", **settings)  # type: ignore[arg-type]


def test_the_check_of_a_folder_names_missing_opposites(tmp_path: Path) -> None:
    root = pair_folder(tmp_path)
    (root / "low" / "1.png").unlink()
    config = DataConfig(control=(str(root / "low"),), controls="opposite")
    found = preflight(scan_folder(root / "high", config), config, folder=root / "high", resolution=SIDE, multiple=8)
    (missing,) = [one for one in found.findings if one.kind == "missing controls"]
    assert "leave --pairs out" in missing.sentence
