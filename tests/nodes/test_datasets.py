from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.workflow.execution_events import NodeProgress

Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images that a careless reader gets wrong, and a file that is none."""
    path = tmp_path / "input" / "set"
    path.mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(path / "10.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "blue").save(path / "2.jpg", exif=exif)
    Image.new("RGBA", (24, 24), (0, 0, 0, 0)).save(path / "3.png")
    (path / "2.txt").write_text("a blue wall\n")
    (path / "10.txt").write_text("a red wall")
    (path / "broken.png").write_text("no image")
    return path


def test_images_come_in_order_upright_and_on_white(bench: Any, folder: Path) -> None:
    (images,) = bench.call("LoadImageDataSetFromFolder", folder="set").outputs
    assert [tuple(image.shape) for image in images] == [(1, 40, 20, 3), (1, 24, 24, 3), (1, 20, 20, 3)]
    assert images[1].min() == 1
    assert any("broken.png is not an image" in text for text in bench.messages("warning"))


def test_captions_come_with_their_images_and_missing_ones_are_told(bench: Any, folder: Path) -> None:
    images, texts = bench.call("LoadImageTextDataSetFromFolder", folder="set").outputs
    assert texts == ("a blue wall", "", "a red wall")
    assert len(images) == 3
    assert any("1 of 3 images have no caption (such as 3.png)" in text for text in bench.messages("warning"))


def test_repeats_in_a_folder_name_count_with_captions_and_not_without(bench: Any, folder: Path) -> None:
    (folder / "2_dog").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "2_dog" / "a.png")
    images, texts = bench.call("LoadImageTextDataSetFromFolder", folder="set").outputs
    assert texts[3:] == ("", "")
    assert images[3] is images[4]
    assert len(bench.call("LoadImageDataSetFromFolder", folder="set").outputs[0]) == 3


def test_a_folder_of_folders_is_refused_where_images_are_wanted(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "input" / "outer" / "1_dog").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "input" / "outer" / "1_dog" / "a.png")
    with pytest.raises(DataError, match="all are in its subfolders"):
        bench.call("LoadImageDataSetFromFolder", folder="outer")


@pytest.mark.parametrize(("texts", "expected"), [(None, ["", ""]), (["a"], ["a", "a"]), (["a", "b"], ["a", "b"])])
def test_a_dataset_takes_one_caption_for_all_or_one_each(
    bench: Any, tiny: Model, pictures: Make, texts: list[str] | None, expected: list[str]
) -> None:
    images = [pictures(1), pictures(1, 64, 32, seed=1)]
    lists = {"images": images} | ({} if texts is None else {"texts": texts})
    latents, conditionings = bench.call(
        "MakeTrainingDataset", lists=lists, vae=tiny.autoencoder, clip=tiny.text_encoder
    ).outputs
    assert [one["samples"].shape[2:] for one in latents] == [(16, 16), (16, 8)]
    assert [[one.text for one in combined] for combined in conditionings] == [[text] for text in expected]
    direct = bench.one("VAEEncode", pixels=images[1], vae=tiny.autoencoder)["samples"]
    assert torch.equal(latents[1]["samples"], direct)


def test_a_dataset_reports_each_caption_and_each_picture(bench: Any, tiny: Model, pictures: Make) -> None:
    """Equal ones count once, and those that are in the cache count as the others."""
    lists = {"images": [pictures(1, seed=seed) for seed in (7, 8, 8)], "texts": ["one", "two", "one"]}
    for _ in range(2):
        bench.events.clear()
        bench.call("MakeTrainingDataset", lists=lists, vae=tiny.autoencoder, clip=tiny.text_encoder)
        told = [event for event in bench.events if isinstance(event, NodeProgress)]
        counts = [(one.text, one.value, one.maximum) for one in told if "hashing" not in one.text]
        captions = [("caption 1 of 2", 1, 2), ("caption 2 of 2", 2, 2)]
        assert counts[:2] == captions and counts[2:] in ([("picture 1 of 2", 1, 2), ("picture 2 of 2", 2, 2)], [])


def test_a_dataset_flattens_batches_and_refuses_other_counts(bench: Any, tiny: Model, pictures: Make) -> None:
    model = {"vae": tiny.autoencoder, "clip": tiny.text_encoder}
    latents, _ = bench.call("MakeTrainingDataset", images=pictures(3), **model).outputs
    assert len(latents) == 3
    with pytest.raises(DataError, match="got 2 for 3 images"):
        bench.call("MakeTrainingDataset", images=pictures(3), lists={"texts": ["a", "b"]}, **model)


def test_buckets_hold_equal_sizes_each_with_its_conditioning(
    bench: Any, latents: Make, captions: list[Conditioning]
) -> None:
    wide, square, also_wide = latents(1, 8, 16), latents(1, 16, 16, seed=1), latents(1, 8, 16, seed=2)
    buckets, conditionings = bench.call(
        "ResolutionBucket", lists={"latents": [wide, square, also_wide], "conditioning": [[one] for one in captions]}
    ).outputs
    assert torch.equal(buckets[0]["samples"], torch.cat((wide["samples"], also_wide["samples"])))
    assert torch.equal(buckets[1]["samples"], square["samples"])
    assert conditionings == ([captions[0], captions[2]], [captions[1]])


def test_buckets_refuse_counts_that_do_not_fit(bench: Any, latents: Make, captions: list[Conditioning]) -> None:
    with pytest.raises(DataError, match="got 3 for 2 images"):
        bench.call("ResolutionBucket", lists={"latents": [latents(2)], "conditioning": [captions]})
