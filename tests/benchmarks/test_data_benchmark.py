"""The benchmark of data: both sides encode the same pictures, and its helpers measure what they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import data


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(data.PICTURES, "PNGs", (200, 150, "png"))
    monkeypatch.setattr(data, "keep_freed_memory", lambda: None)  # it would change this whole process
    return data.made(tmp_path / "PNGs", "PNGs", 2)


def test_both_sides_encode_the_same(pictures: Path) -> None:
    (_, _, plain), (_, _, ours) = (
        data._SIDES[name](pictures, "built-in", 64, "cpu") for name in ("plain", "lorasmith")
    )
    assert len(plain) == len(ours) == 2
    for one, other in zip(plain, ours, strict=True):
        assert one.shape == other.shape
        assert (one - other).square().mean() < 1e-4 * one.square().mean()
    assert not torch.equal(ours[0], ours[1])


def test_pictures_are_made_once(pictures: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert before.keys() == {"0.png", "1.png"}
    data.made(pictures, "PNGs", 2)
    assert {path.name: path.stat().st_mtime_ns for path in pictures.iterdir()} == before


def test_small_images_and_names_are_all_found(tmp_path: Path) -> None:
    small = data._made_small(tmp_path / "small", 7)
    assert data._checked(small) == 7
    with Image.open(small / "0.jpg") as image:
        assert image.size == (96, 96)
    assert data._listed(data._named(tmp_path / "names", 40)) == 20
