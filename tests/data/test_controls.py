"""Folders of pairs: which file is the control of which image, what is refused, framings, cache and draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformer_models import Case

from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.random import keyed_uniform
from lorasmith.data.controls import check_controls, control_framings
from lorasmith.data.crops import framings
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import FolderScan, ImageFile, scan_folder
from lorasmith.families.forms import ControlForm
from lorasmith.families.model import Model
from tests.data.folder_cases import add_image


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Case.of("flux2-klein", tmp_path_factory.mktemp("klein")).ours


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Case.of("flux1", tmp_path_factory.mktemp("flux1")).ours


def found(scan: FolderScan, root: Path) -> dict[str, list[str]]:
    return {one.name: [c.path.relative_to(root).as_posix() for c in one.controls] for one in scan.images}


def folder_of(root: Path, files: Sequence[str]) -> Path:
    for name in files:
        add_image(root / name)
    return root


def test_controls_have_the_names_of_their_images(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", "b.png", "10_dog/c.png", "control/a.webp", "control/b_10.png", "control/b_2.png"])
    folder_of(tmp_path, ["control/c.png", "control_1/a.png", "control/stray.png"])
    scan = scan_folder(tmp_path)
    assert found(scan, tmp_path) == {
        "a.png": ["control/a.webp", "control_1/a.png"],
        "b.png": ["control/b_2.png", "control/b_10.png"],
        "c.png": ["control/c.png"],
    }
    assert scan.skipped == ()
    assert scan.notes == ("1 control is not used, such as stray.png, as there is no image of the name",)
    assert found(scan_folder(tmp_path, DataConfig(recursive=True)), tmp_path).keys() == {"a.png", "b.png", "c.png"}
    without = scan_folder(tmp_path, DataConfig(controls="none"))
    assert not any(one.controls for one in without.images)
    assert [path.name for path, _ in without.skipped] == ["control", "control_1"]


def test_a_number_is_of_the_image_of_that_name_if_there_is_one(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", "a_1.png", "control/a.png", "control/a_1.png", "control/a_2.png"])
    assert found(scan_folder(tmp_path), tmp_path) == {
        "a.png": ["control/a.png", "control/a_2.png"],
        "a_1.png": ["control/a_1.png"],
    }


def test_folders_that_are_named_replace_those_inside(tmp_path: Path) -> None:
    folder_of(tmp_path, ["images/a.png", "images/control/a.png", "before/a.jpg", "depth/a.png"])
    config = DataConfig(control=(str(tmp_path / "before"), str(tmp_path / "depth")))
    assert found(scan_folder(tmp_path / "images", config), tmp_path) == {"a.png": ["before/a.jpg", "depth/a.png"]}
    one = DataConfig(control=str(tmp_path / "before"))  # type: ignore[arg-type]
    assert one.control == (str(tmp_path / "before"),)
    for path, told in ((tmp_path / "gone", "must be a folder"), (tmp_path / "images", "must be another folder")):
        with pytest.raises(DataError, match=f"^control {told}"):
            scan_folder(tmp_path / "images", DataConfig(control=(str(path),)))
    with pytest.raises(OptionError, match="control is for controls required or optional, got controls none"):
        DataConfig(control=("before",), controls="none")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"control_path": "before/x.png"}, ["before/x.png"]),
        ({"control_path_2": "before/y.png", "control_path_0": "before/x.png"}, ["before/x.png", "before/y.png"]),
        ({"edit_image": ["before/x.png", "before/y.png"]}, ["before/x.png", "before/y.png"]),
        ({"kontext_images": "before/y.png"}, ["before/y.png"]),
        ({"control_1": "before/y.png", "control": "before/x.png"}, ["before/x.png", "before/y.png"]),
        ({"control_path": None, "edit_image": ""}, []),
    ],
    ids=str,
)
def test_json_lines_name_controls_inside_of_their_folder(tmp_path: Path, entry: object, expected: list[str]) -> None:
    folder_of(tmp_path / "set", ["a.png", "before/x.png", "before/y.png"])
    line = {"file_name": "a.png", "text": "make it blue", **entry}  # type: ignore[dict-item]
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(line))
    for source in (tmp_path / "set", tmp_path / "set" / "metadata.jsonl"):
        scan = scan_folder(source)
        assert found(scan, tmp_path / "set") == {"a.png": expected}


def test_rows_of_tables_and_of_diffsynth_name_controls(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", "b.png", "before/x.png", "before/y.png"])
    files = {
        "metadata.csv": "image,prompt,edit_image\na.png,make it blue,before/x.png\nb.png,again,\n",
        "metadata.json": json.dumps(
            [
                {"image": "a.png", "prompt": "make it blue", "edit_image": ["before/x.png", "before/y.png"]},
                {"image": "b.png", "prompt": "again"},
            ]
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        scan = scan_folder(tmp_path / name)
        expected = ["before/x.png", "before/y.png"][: 1 if name.endswith(".csv") else 2]
        assert found(scan, tmp_path) == {"a.png": expected, "b.png": []}
        assert [one.caption for one in scan.images] == ["make it blue", "again"]
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("given", "told"),
    [(3, "is 3, not a path"), ({"a": 1}, "is a dict, not a path"), (["x.png", 1.5], "is 1.5")],
    ids=str,
)
def test_what_is_no_path_leaves_its_image_out(tmp_path: Path, given: object, told: str) -> None:
    folder_of(tmp_path, ["a.png", "b.png", "x.png"])
    write_lines(tmp_path, {"a.png": given, "b.png": "x.png"})
    scan = scan_folder(tmp_path)
    assert found(scan, tmp_path) == {"b.png": ["x.png"], "x.png": []} or found(scan, tmp_path) == {"b.png": ["x.png"]}
    reason = dict(scan.skipped)[tmp_path / "a.png"]
    assert reason.startswith(f"is left out because its control_path {told}") and reason.kind == "control"


def write_lines(folder: Path, controls: dict[str, object]) -> None:
    lines = [{"file_name": name, "text": "make it blue", "control_path": one} for name, one in controls.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_controls_that_json_lines_name_beside_their_images_are_not_trained_on(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", "a_before.png", "b.png", "other.png"])
    write_lines(tmp_path, {"a.png": "a_before.png", "b.png": "a.png"})
    assert found(scan_folder(tmp_path), tmp_path) == {"a.png": ["a_before.png"], "b.png": ["a.png"], "other.png": []}
    assert "a_before.png" in found(scan_folder(tmp_path, DataConfig(controls="none")), tmp_path)
    scan = scan_folder(tmp_path / "metadata.jsonl")
    assert found(scan, tmp_path).keys() == {"a.png", "b.png"}
    assert scan.notes == ("1 image is not used, such as other.png, as the metadata file does not name them",)


@pytest.mark.parametrize("outside", ["../x.png", "/etc/hostname", ["before.png", "../x.png"], "C:\\x.png"], ids=str)
def test_an_image_whose_control_is_outside_of_the_folder_is_not_trained_without_it(
    tmp_path: Path, klein: Model, outside: object
) -> None:
    images = folder_of(tmp_path / "set", ["a.png", "b.png", "before.png"])
    add_image(tmp_path / "x.png")
    write_lines(images, {"a.png": outside, "b.png": []})
    scan = scan_folder(images, DataConfig(follow_links=True))
    assert "a.png" not in found(scan, images)
    assert "is outside of the folder; copy it into the folder" in dict(scan.skipped)[images / "a.png"]
    with pytest.raises(DataError, match=r"^a.png is left out because its control .*, or choose controls optional$"):
        check_controls(scan, DataConfig(), klein)
    assert "a.png" in found(scan_folder(images, DataConfig(controls="none")), images)
    add_image(images / "control" / "a.png")
    assert found(scan_folder(images), images)["a.png"] == ["control/a.png"]


def test_controls_behind_links_are_not_read(tmp_path: Path) -> None:
    folder_of(tmp_path, ["set/a.png", "set/b.png", "set/before/b.png", "secret.png"])
    (tmp_path / "set" / "before" / "a.png").symlink_to(tmp_path / "secret.png")
    lines = [{"file_name": f"{one}.png", "text": one, "control_path": f"before/{one}.png"} for one in "ab"]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scan = scan_folder(tmp_path / "set")
    assert [one.name for one in scan.images] == ["b.png"]
    assert "control a.png is a link out of its folder" in dict(scan.skipped)[tmp_path / "set" / "a.png"]
    (tmp_path / "set" / "before").rename(tmp_path / "set" / "control")
    (tmp_path / "set" / "metadata.jsonl").unlink()
    assert [one.name for one in scan_folder(tmp_path / "set").images] == ["b.png"]
    followed = scan_folder(tmp_path / "set", DataConfig(follow_links=True))
    assert [one.name for one in followed.images] == ["a.png", "b.png"]


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path, klein: Model, dev: Model) -> None:
    kontext = dev.as_edit("kontext")
    images = folder_of(tmp_path / "set", ["a.png", "b.png"])

    def told(model: Model, **settings: object) -> str:
        config = DataConfig(**settings)  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            check_controls(scan_folder(images, config), config, model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def fits(model: Model, **settings: object) -> None:
        config = DataConfig(**settings)  # type: ignore[arg-type]
        check_controls(scan_folder(images, config), config, model)

    fits(klein), fits(dev), fits(kontext, controls="optional"), fits(kontext, controls="none")
    assert "needs a control for each image, but none of 2 images has a file of its name in a folder" in told(kontext)
    (tmp_path / "before").mkdir()
    assert "none of 2 images has a file of its name in" in told(klein, control=(str(tmp_path / "before"),))
    add_image(images / "control" / "a.png")
    for model in (klein, kontext):
        assert "there is none for b.png; add a file of the same name to " in told(model)
        fits(model, controls="optional")
    assert "(Flux.1) takes no controls, but a.png has " in told(dev) and "choose edit kontext if it is an" in told(dev)
    fits(dev, controls="none")
    beside = (str(images / "control"),)
    assert told(dev, control=beside).endswith("or leave control out to train without them")
    folder_of(images, ["control/b.png", "control/b_1.png"])
    assert "a.png has 1 and b.png 2; add or remove some, or choose controls optional" in told(klein)
    fits(klein, controls="optional")
    (images / "control" / "b_1.png").write_bytes(b"no picture")
    assert "b.png is left out because its control b_1.png is not an image" in told(klein)
    (images / "control" / "b_1.png").unlink()
    fits(klein), fits(kontext)
    for number in range(2, 13):
        add_image(images / "control" / f"a_{number}.png")
    assert "takes at most 10 controls, but a.png has 12; remove some" in told(klein)


def image(width: int, height: int) -> ImageFile:
    return ImageFile(Path("a.png"), width, height, "", "none")


def test_aligned_controls_have_the_part_of_their_image_and_others_their_own_size() -> None:
    config = DataConfig(resolution=64, flip=True, crop="random", picture_variants=2, crop_jitter=0.2)
    wide = image(200, 100)
    ways = framings(wide.width, wide.height, config, resolution=64, multiple=16, name="a.png")
    aligned, free = ControlForm(is_aligned=True), ControlForm()
    for way, half in zip(ways, control_framings(image(100, 50), wide, ways, aligned), strict=True):
        assert (half.width, half.height, half.is_mirrored) == (way.width, way.height, way.is_mirrored)
        assert half.box == pytest.approx([edge / 2 for edge in way.box])
    other = control_framings(image(60, 120), wide, ways, aligned)
    assert {(one.width, one.height) for one in other} == {(48, 80)}, "its own bucket, of as many pixels"
    assert [one.is_mirrored for one in other] == [one.is_mirrored for one in ways]
    own = control_framings(image(60, 120), wide, ways, free)
    assert {(one.width, one.height) for one in own} == {(48, 112)}
    assert len(set(own)) == 2, "plain and mirrored"


def coloured(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_pairs_are_encoded_once_cached_flipped_together_and_drawn(tmp_path: Path, klein: Model) -> None:
    for number, name in enumerate("ab"):
        coloured(tmp_path / f"{name}.png", number)
        coloured(tmp_path / "control" / f"{name}.png", 10 + number, (96, 64))
    settings = {"resolution": 64, "flip": True, "caption_dropout": 0.5, "control_dropout": 0.5, "trigger": "blue"}
    data = load_dataset(tmp_path, klein, **settings)  # type: ignore[arg-type]
    again = load_dataset(tmp_path, klein, **settings)  # type: ignore[arg-type]
    plain = load_dataset(tmp_path, klein, resolution=64, controls="none")
    assert [one.digest for one in data] == [one.digest for one in again]
    assert all(one.digest != other.digest for one, other in zip(data, plain, strict=True))
    for sample, same, alone in zip(data, again, plain, strict=True):
        (control,) = sample.conditioning.controls
        assert control.shape == (1, 128, 4, 6) and torch.equal(control, same.conditioning.controls[0])
        assert torch.equal(sample.latents, alone.latents) and not alone.conditioning.controls
        with Image.open(tmp_path / "control" / sample.name) as picture:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        encoded = klein.components.latent.to_model(klein.autoencoder.encode(pixels))
        mirrored = klein.components.latent.to_model(klein.autoencoder.encode(pixels.flip(-1)))
        sizes = [(sample.size_drawn(0, draw), sample.drawn(0, draw).size) for draw in range(16)]
        own = sample.latents.numel()
        assert all(one == other for one, other in sizes) and {one for one, _ in sizes} == {own, own + control.numel()}
        torch.testing.assert_close(control, encoded, rtol=1e-4, atol=1e-4)
        assert sample.variants is not None
        straight, flipped = sample.variants.pictures
        torch.testing.assert_close(flipped.inputs["control_0"], mirrored, rtol=1e-4, atol=1e-4)
        seen = set()
        for draw in range(40):
            drawn = sample.drawn(7, draw)
            is_left_out = keyed_uniform(7, "controls", draw) < 0.5
            assert len(drawn.conditioning.controls) == (not is_left_out)
            if not is_left_out:
                is_flipped = torch.equal(drawn.latents, flipped.latents)
                beside = flipped if is_flipped else straight
                assert torch.equal(drawn.conditioning.controls[0], beside.inputs["control_0"])
            seen.add((drawn.conditioning.text, is_left_out))
        assert seen == {(text, left_out) for text in ("blue", "") for left_out in (True, False)}


def test_only_different_framings_of_a_control_are_encoded(
    tmp_path: Path, klein: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured(tmp_path / "a.png", 1)
    coloured(tmp_path / "control" / "a.png", 2, (48, 48))
    sizes: list[tuple[int, ...]] = []
    encode = type(klein.autoencoder).encode
    monkeypatch.setattr(
        type(klein.autoencoder),
        "encode",
        lambda self, pixels: (sizes.append(tuple(pixels.shape)), encode(self, pixels))[1],
    )
    load_dataset(tmp_path, klein, resolution=64, more_resolutions="32", cache=False)
    assert sizes == [(1, 3, 64, 64), (1, 3, 32, 32), (1, 3, 48, 48)]


def test_kontext_trains_on_controls_of_the_size_and_part_of_their_images(tmp_path: Path, dev: Model) -> None:
    """Here the control is the image, so that its latents are the image's in each framing."""
    for place in (tmp_path, tmp_path / "control"):
        coloured(place / "a.png", 1, (96, 64))
    kontext = dev.as_edit("kontext")
    (sample,) = load_dataset(
        tmp_path, kontext, resolution=32, crop="random", crop_jitter=0.3, colour_jitter=0.3, flip=True
    )
    assert sample.variants is not None and len(sample.variants.pictures) == 8
    for picture in sample.variants.pictures:
        torch.testing.assert_close(picture.inputs["control_0"][0], picture.latents, rtol=1e-4, atol=1e-4)
    other = tmp_path / "control" / "a.png"
    coloured(other, 1, (64, 96))
    (sample,) = load_dataset(tmp_path, kontext, resolution=64)
    (control,) = sample.conditioning.controls
    assert (sample.latents.shape, control.shape) == ((16, 6, 10), (1, 16, 10, 6)), "another aspect ratio"
