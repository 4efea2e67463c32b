"""Pictures in memory and lists of files as sources: what is accepted, and that the rest is as for a folder of files."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lorasmith.core.errors import DataError, LorasmithError
from lorasmith.core.options import config_from
from lorasmith.data.clips import steady_times
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import FolderScan, ImageFile, scan_sources
from lorasmith.data.image_files import open_layers
from lorasmith.data.memory_source import PictureItems
from lorasmith.families.model import Model

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
BATCH = np.stack([PIXELS] * 3)


def scanned(spool: Path, *items: object, clips: bool = False, **settings: Any) -> FolderScan:
    config = config_from(DataConfig, settings)
    return scan_sources([PictureItems(items, spool, rate=10.0)], config, clips=clips)


def one(spool: Path, item: object, **settings: Any) -> ImageFile:
    (image,) = scanned(spool, item, **settings).images
    return image


def pixels_of(image: ImageFile) -> np.ndarray:
    return np.asarray(open_layers(image.path)[0])


FORMS: dict[str, Any] = {
    "array": PIXELS,
    "channels first": PIXELS.transpose(2, 0, 1),
    "float": PIXELS / 255,
    "half": torch.from_numpy(PIXELS / 255).half(),
    "bfloat": torch.from_numpy(PIXELS / 255).bfloat16(),
    "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
    "float tensor": (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
    "a batch of one": PIXELS[None],
    "picture": Image.fromarray(PIXELS),
    "slightly beyond 1": np.where(PIXELS == 255, 1.0001, PIXELS / 255),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_in_every_form_has_one_digest(form: str, tmp_path: Path) -> None:
    plain, other = (one(tmp_path / name, (given, "a dog")) for name, given in (("a", PIXELS), ("b", FORMS[form])))
    assert np.array_equal(pixels_of(other), PIXELS)
    assert (other.digest, other.width, other.height, other.captions) == (plain.digest, 40, 24, ("a dog",))


def test_grey_and_alpha(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    for number, given in enumerate((grey, grey[..., None], grey[None], torch.from_numpy(grey) / 255)):
        assert np.array_equal(pixels_of(one(tmp_path / str(number), (given, ""))), np.stack([grey] * 3, -1))
    clear = np.dstack([PIXELS, np.zeros_like(grey)])
    assert pixels_of(one(tmp_path / "clear", (clear, ""))).min() == 255, "transparency is laid on white"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PIXELS / 127.5 - 1, r"in 0\.\.1, got -1 to 1 for item 0; convert it with \(x \+ 1\) / 2"),
        (PIXELS.astype(np.float32), r"in 0\.\.1, got 0 to 255 for item 0; convert it with x / 255"),
        (np.full((24, 40), np.nan), "must be finite"),
        (PIXELS.astype(np.int64), "uint8 or floats in 0..1, got int64"),
        (PIXELS > 9, "got bool"),
        (PIXELS[:, :, :2], r"the shape \(24, 40, 2\) for item 0; transpose it"),
        (PIXELS[:3], r"must say where its channels are, got the shape \(3, 40, 3\)"),
        (np.zeros((0, 40, 3), np.uint8), "shape"),
        (np.zeros(7), "shape"),
        (BATCH, "is a clip of 3 frames, on which models of pictures are not trained"),
        (3, "must be a PIL picture, a numpy array, a torch tensor or a path, got 3"),
        (Image.new("RGB", (9, 9)), "shorter edge must be 16"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_remedy(given: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        scanned(tmp_path, (given, "a dog"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "item 0 must be a pair"),
        (PIXELS, "must have a caption beside its picture, got an? ndarray alone"),
        ((PIXELS, 3), "caption of item 0 must be a text, a list of texts or None, got 3"),
        ((PIXELS, [3]), "caption of item 0"),
        ((PIXELS, "a" * 20_001), "20,001; shorten"),
        ((PIXELS,), "item 0 must be a pair"),
        ({"pixel_values": PIXELS, "text": "a"}, "got the fields pixel_values, text"),
        ({"image": PIXELS, "repeats": 0}, "repeats must be between"),
        ({"image": PIXELS, "frame_rate": "x"}, "frame_rate of item 0"),
        ({"image": PIXELS, "mask": 3}, r"item 0 \(its mask\) must be a PIL picture"),
    ],
)
def test_what_is_no_item_is_refused_with_the_remedy(item: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(LorasmithError, match=message):
        scanned(tmp_path, item)


def test_settings_that_are_for_files_alone_are_refused(tmp_path: Path) -> None:
    for settings in ({"captions": "folder"}, {"captions": "filename"}):
        with pytest.raises(LorasmithError, match="is for files, got a picture in memory"):
            scanned(tmp_path, (PIXELS, "a dog"), **settings)
    with pytest.raises(DataError, match="masks alpha"):
        scanned(tmp_path, (PIXELS, "a dog", PIXELS), masks="alpha")


def test_fields_of_a_dict(tmp_path: Path) -> None:
    item = {"image": PIXELS, "caption": ["a", "b"], "file_name": "../../evil.png", "repeats": 2, "weight": 0.5, "id": 7}
    image = one(tmp_path / "spool", item)
    assert (image.name, image.captions, image.repeats, image.weight) == ("evil.png", ("a", "b"), 2, 0.5)
    assert image.path.is_relative_to(tmp_path / "spool")
    for name in ("..", "/", "\0", "con/.."):
        assert one(tmp_path / "more", {"image": PIXELS, "file_name": name}).path.is_relative_to(tmp_path / "more")


def test_masks_in_every_form(tmp_path: Path) -> None:
    inside = np.zeros((24, 40), bool)
    inside[:, :20] = True
    expected = np.stack([inside * 255] * 3, -1)
    forms: list[Any] = [inside, torch.from_numpy(inside), inside * 1.0, Image.fromarray(inside)]
    for number, mask in enumerate(forms):
        image = one(tmp_path / str(number), (PIXELS, "a dog", mask))
        assert image.mask is not None and np.array_equal(np.asarray(open_layers(image.mask)[0]), expected)
    with pytest.raises(DataError, match="one aspect ratio"):
        scanned(tmp_path / "other", (PIXELS, "a dog", inside[:5]))


class Pairs(Dataset[Any]):
    """A dataset of torch, which raises no IndexError behind its end."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(PIXELS), f"caption {index}"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(PIXELS, "caption 0"), {"image": PIXELS, "text": "caption 1"}])


@pytest.mark.parametrize("images", [Pairs(), Stream(), [Pairs()[0], Pairs()[1]]])
def test_datasets_of_torch(images: Any, tiny: Model) -> None:
    data = load_dataset(images, tiny, resolution=32)
    assert [sample.conditioning.text for sample in data] == ["caption 0", "caption 1"]
    assert [sample.name for sample in data] == ["picture 0", "picture 1"]
    assert data.origin == "pictures in memory"


def test_a_generator_is_read_once_and_holds_few_pictures(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pixels(np.ndarray):
        pass

    most, read = 0, list[weakref.ref[Any]]()

    def pictures() -> Iterator[Any]:
        nonlocal most
        for number in range(6):
            pixels = (PIXELS + number).view(Pixels)
            read.append(weakref.ref(pixels))
            most = max(most, sum(one() is not None for one in read))
            yield pixels, f"{number}"
            del pixels

    folders: list[str] = []
    made = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *given: folders.append(made(*given)) or folders[-1])
    data = load_dataset(pictures(), tiny, resolution=32, cache=False)
    assert [sample.conditioning.text for sample in data] == [*"012345"]
    assert most <= 2
    assert len({sample.latents.sum().item() for sample in data}) == 6
    with pytest.raises(DataError, match="transpose"):
        load_dataset(iter([(PIXELS, "a"), (PIXELS[0, 0], "b")]), tiny)
    assert len(folders) == 2 and not any(Path(folder).exists() for folder in folders), "nothing is left behind"


def test_everything_else_is_as_for_files(tiny: Model, tmp_path: Path) -> None:
    names = ["1.png", "2.png"]
    for number, name in enumerate(names):
        Image.fromarray(PIXELS + number).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"red, {{old|new}}, {number}")
        Image.fromarray(PIXELS[..., 0]).save(tmp_path / f"{number + 1}.mask.png")
    settings: dict[str, Any] = {
        "resolution": 32,
        "flip": True,
        "crop": "random",
        "trigger": "sks",
        "shuffle_tags": True,
        "wildcards": True,
        "caption_dropout": 0.3,
        "masks": "files",
    }
    files = load_dataset(tmp_path, tiny, **settings)
    items = [
        {"image": PIXELS + number, "text": f"red, {{old|new}}, {number}", "mask": PIXELS[..., 0], "file_name": name}
        for number, name in enumerate(names)
    ]
    held = load_dataset(items, tiny, **settings)
    for draw in range(20):
        for ours, theirs in zip(held, files, strict=True):
            ours, theirs = ours.drawn(3, draw), theirs.drawn(3, draw)
            assert torch.equal(ours.latents, theirs.latents)
            assert ours.conditioning.text == theirs.conditioning.text
            assert ours.places is not None and theirs.places is not None
            assert torch.equal(ours.places, theirs.places)


def digests(data: EncodedDataset) -> list[str]:
    return [sample.digest for sample in data]


def test_digests_are_of_pixels_and_found_in_the_cache(tiny: Model) -> None:
    def load(pixels: Any, caption: str = "a dog") -> list[str]:
        return digests(load_dataset([(pixels, caption)], tiny, resolution=32))

    assert load(PIXELS) == load(Image.fromarray(PIXELS)) == load(PIXELS / 255)
    assert load(PIXELS) != load(PIXELS + 1)
    assert load(PIXELS) != load(PIXELS, "a cat")


def test_a_list_of_files_has_the_captions_beside_them(tiny: Model, tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "1.txt").write_text("a dog")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "a cat"}\n')
    paths: list[object] = [tmp_path / "2.png", str(tmp_path / "1.png"), (tmp_path / "1.png", "a fox")]
    data = load_dataset([*paths, tmp_path / "none.png"], tiny, resolution=32)
    assert [sample.conditioning.text for sample in data] == ["a cat", "a dog", "a fox"]
    assert data.notes == ("none.png does not exist; check the name",)
    assert data.origin == ""
    mixed = load_dataset([ImageSource(str(tmp_path), repeats=2), (PIXELS, "a bird"), tmp_path / "1.png"], tiny)
    assert len(mixed) == 3 * 2 + 2
    assert [sample.conditioning.text for sample in mixed[-2:]] == ["a bird", "a dog"]


def test_a_dataset_of_others_names_no_files(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "private.png")
    path = str(tmp_path / "private.png")
    for item in ({"image": path}, {"file_name": path}, {"image": PIXELS, "mask": path}):
        assert len(scan_sources([PictureItems([item], tmp_path / "own")]).images) == 1
        with pytest.raises(DataError, match="a dataset must hold its pictures, got a path in item 0"):
            scan_sources([PictureItems([item], tmp_path / "spool", names_files=False)])


def test_pictures_without_a_caption_are_named(tiny: Model) -> None:
    data = load_dataset([(PIXELS, "a dog"), (PIXELS, None)], tiny, resolution=32)
    assert data.notes == ("1 of 2 pictures have no caption, such as picture 1; an empty text is used",)


@pytest.mark.parametrize("given", [None, 3, {}, b"x", PIXELS, torch.zeros(3), object(), DataLoader([1])])  # type: ignore[arg-type]
def test_what_is_no_source_is_refused(given: object, tiny: Model) -> None:
    with pytest.raises(DataError, match="images must be a folder"):
        load_dataset(given, tiny)
    with pytest.raises(DataError, match="must have pictures, got none"):
        load_dataset(iter(()), tiny)


def test_a_clip_is_its_frames(tmp_path: Path) -> None:
    frames = np.stack([PIXELS + number for number in range(5)])
    forms: list[Any] = [frames, frames / 255, torch.from_numpy(frames).permute(0, 3, 1, 2)]
    for number, form in enumerate(forms):
        image = one(tmp_path / str(number), (form, "a wave"), clips=True)
        assert (image.times, image.width, image.height) == (steady_times(5, 10.0), 40, 24)
        with Image.open(image.path) as film:
            for index in range(5):
                film.seek(index)
                assert np.array_equal(np.asarray(film), frames[index])
    item = {"video": frames[:1], "text": "a still", "frame_rate": 25}
    image = one(tmp_path / "one", item, clips=True)
    assert (image.times, image.name) == ((0.0, 0.04), "clip 0")


def test_controls_beside_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "before.png"
    Image.fromarray(PIXELS[::-1].copy()).save(file)
    image = one(tmp_path / "a", {"image": PIXELS, "text": "make it blue", "control": [255 - PIXELS, file]})
    assert [np.array_equal(pixels_of(c), e) for c, e in zip(image.controls, (255 - PIXELS, PIXELS[::-1]), strict=True)]
    numbered = one(tmp_path / "b", {"image": PIXELS, "control_1": file, "control": 255 - PIXELS, "control_2": None})
    assert [c.digest for c in numbered.controls] == [c.digest for c in image.controls]
    assert one(tmp_path / "c", {"image": PIXELS, "control": file}, controls="none").controls == ()
    assert one(tmp_path / "d", {"image": str(file), "control": PIXELS}).controls[0].digest == image.digest


@pytest.mark.parametrize("name", ["controls", "control_image", "controlnet"])
def test_a_control_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"named control, a picture or a list of them, got {name} in item 0; rename it"):
        scanned(tmp_path, {"image": PIXELS, name: PIXELS})


def test_a_dataset_names_no_controls_elsewhere(tmp_path: Path) -> None:
    items = [{"image": PIXELS, "control": "/etc/hostname"}]
    with pytest.raises(DataError, match="got a path in item 0, which is not read"):
        scan_sources([PictureItems(items, tmp_path, names_files=False)])
