"""Image sets give what ComfyUI's nodes gave (`tests/peers/record_comfyui_datasets.py`), and stay within bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_cases import IMAGE_CASES, ORDER_CASES, PICTURES, numbered
from safetensors import safe_open
from torch import Tensor

from lorasmith.core.errors import DataError, OptionError

Make = Callable[..., Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "comfyui_dataset_nodes.safetensors"
ROUNDED = {"CenterCropImages": 1.01 / 255, "RandomCropImages": 1.01 / 255, "ImageGrid": 2.01 / 255}
"""Nodes that cut values to 8 bits on the way, and what that may cost; Pillow before 13 rounds otherwise."""


def recorded(name: str) -> list[Tensor]:
    """Pictures of a case."""
    with safe_open(GOLDEN, "pt") as file:
        keys = sorted((key for key in file.keys() if key.rpartition(".")[0] == name), key=lambda key: int(key[-1]))  # noqa: SIM118
        found = [file.get_tensor(key) for key in keys]
    return [one / 255 if one.dtype is torch.uint8 else one for one in found]


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_pictures_are_comfyuis(bench: Any, name: str) -> None:
    case = IMAGE_CASES[name]
    pictures = PICTURES[case.pictures]
    lists = {"images": pictures if isinstance(pictures, list) else [pictures]}
    (made,) = bench.call(case.node, lists=lists, **case.inputs).outputs
    expected = recorded(name)
    assert [one.shape for one in made] == [one.shape for one in expected]
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=ROUNDED.get(case.node, 1e-6))


@pytest.mark.parametrize(("count", "seed"), ORDER_CASES)
def test_orders_are_comfyuis_and_pairs_stay_together(bench: Any, count: int, seed: int) -> None:
    with safe_open(GOLDEN, "pt") as file:
        theirs = json.loads(file.metadata()["orders"])[ORDER_CASES.index((count, seed))]
    images = numbered(count)
    (alone,) = bench.call("ShuffleDataset", lists={"images": [torch.cat(images)]}, seed=seed).outputs
    assert [round(float(one[0, 0, 0, 0]) * 255) for one in alone] == theirs["images"]
    lists = {"images": images, "texts": [str(number) for number in range(count)]}
    pictures, texts = bench.call("ShuffleImageTextDataset", lists=lists, seed=seed).outputs
    assert [round(float(one[0, 0, 0, 0]) * 255) for one in pictures] == theirs["pairs"]
    assert [int(text) for text in texts] == theirs["texts"]


def test_a_crop_keeps_every_bit(bench: Any, pictures: Make) -> None:
    image = pictures(2, 20, 30)
    assert torch.equal(bench.one("CenterCropImages", images=image, width=10, height=12), image[:, 4:16, 10:20])
    cut = bench.one("RandomCropImages", images=image, width=10, height=12, seed=5)
    assert any(torch.equal(cut, image[:, top : top + 12, left : left + 10]) for top in range(9) for left in range(21))


def test_images_keep_their_own_sizes(bench: Any, pictures: Make) -> None:
    images = [pictures(1, 20, 40), pictures(1, 30, 30, seed=1)]
    (made,) = bench.call("ResizeImagesByShorterEdge", lists={"images": images}, shorter_edge=10).outputs
    assert [tuple(one.shape) for one in made] == [(1, 10, 20, 3), (1, 10, 10, 3)]
    (flat,) = bench.call("MergeImageLists", lists={"images": [images[0], pictures(2)]}).outputs
    assert [len(one) for one in flat] == [1, 1, 1]


def test_a_line_of_one_pixel_stays_a_picture(bench: Any) -> None:
    assert bench.one("ResizeImagesByLongerEdge", images=torch.zeros(1, 2, 900, 3), longer_edge=30).shape[1:3] == (1, 30)


def test_pairs_that_do_not_match_are_refused(bench: Any, pictures: Make) -> None:
    with pytest.raises(DataError, match="one text per image or one for all, got 2 for 3 images"):
        bench.call("ShuffleImageTextDataset", images=pictures(3), lists={"texts": ["a", "b"]})


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("ImageGrid", {"images": torch.zeros(100, 1, 1, 3), "columns": 20, "cell_width": 2048, "cell_height": 2048}),
        ("ImageGrid", {"images": torch.zeros(100, 1, 1, 3), "columns": 1, "cell_width": 2048, "cell_height": 2048}),
        ("ResizeImagesByShorterEdge", {"images": torch.zeros(1, 2, 2000, 3), "shorter_edge": 8192}),
        ("ResizeImagesByLongerEdge", {"images": torch.zeros(3, 8, 8, 3), "longer_edge": 8192}),
    ],
)
def test_no_graph_takes_all_memory(bench: Any, node: str, inputs: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"at most 134,217,728 pixels together, got"):
        bench.call(node, **inputs)


def test_a_grid_needs_an_image(bench: Any) -> None:
    with pytest.raises(DataError, match="images must be at least one"):
        bench.call("ImageGrid", lists={"images": []})


def test_many_images_are_compared_quickly(bench: Any) -> None:
    images = torch.rand(500, 8, 8, 3)
    (kept,) = bench.call("ImageDeduplication", images=torch.cat((images, images)), similarity_threshold=1.0).outputs
    assert len(kept) == 500
    assert "500 of 1000 images are kept." in bench.messages("info")
