"""Held-out images: which, how many, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import DataError
from lorasmith.data.dataset import AUTOMATIC_FROM, EncodedDataset, Sample, Split, held_out_names, split
from lorasmith.families.conditionings import Conditioning

NAMES = st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=40, unique=True)


def dataset(names: Sequence[str], *, channels: int = 4) -> EncodedDataset:
    """A sample for each name, each with latents of its own."""
    conditioning = Conditioning({"context": torch.zeros(1, 2, 3)})
    return EncodedDataset(
        tuple(Sample(torch.full((channels, 2, 2), float(i)), conditioning, name) for i, name in enumerate(names))
    )


def held_out(parts: Split) -> set[str]:
    return set() if parts.held_out is None else {sample.name for sample in parts.held_out.samples}


@given(names=NAMES, share=st.floats(0.01, 0.99))
def test_a_share_is_rounded_up_and_never_all(names: list[str], share: float) -> None:
    data = dataset(names)
    parts = split(data, share=share)
    assert parts.held_out is not None
    assert sorted(sample.name for one in (parts.training, parts.held_out) for sample in one.samples) == sorted(names)
    assert 1 <= len(parts.held_out) < len(names)
    assert share * len(names) - 1e-6 <= len(parts.held_out) < share * len(names) + 1 or len(parts.training) == 1


@given(names=NAMES, extra=st.text(min_size=7, max_size=8), share=st.floats(0.05, 0.9))
def test_another_image_moves_at_most_two(names: list[str], extra: str, share: float) -> None:
    before = held_out(split(dataset(names), share=share))
    after = held_out(split(dataset([extra, *reversed(names)]), share=share))
    assert len(before ^ after) <= 2


def test_left_out_it_is_a_tenth_from_twelve_images_on() -> None:
    for images, count in [(1, 0), (11, 0), (12, 2), (20, 2), (21, 3), (30, 3), (100, 10)]:
        parts = split(dataset([f"{index}.png" for index in range(images)]))
        assert len(held_out(parts)) == count
        if count:
            assert f"{count} of {images} images are held out of training" in parts.note
            assert all(name in parts.note for name in sorted(held_out(parts))[:1])
        else:
            assert "overfitting cannot be judged" in parts.note
            assert str(AUTOMATIC_FROM) in parts.note


def test_repeats_and_copies_of_an_image_go_together() -> None:
    data = dataset([name for name in "abcdefghijkl" for _ in range(3)])
    parts = split(data)
    assert parts.held_out is not None
    assert len(held_out(parts)) == 2
    assert len(parts.held_out) == 6
    assert not held_out(parts) & {sample.name for sample in parts.training.samples}


def test_eleven_images_that_repeat_are_eleven() -> None:
    assert split(dataset([str(index % 11) for index in range(110)])).held_out is None


def test_zero_holds_nothing_out_and_says_what_follows() -> None:
    data = dataset([str(index) for index in range(50)])
    parts = split(data, share=0.0)
    assert parts.training is data
    assert parts.held_out is None
    assert parts.note == "overfitting cannot be judged: nothing is held out"


def test_one_image_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="needs at least two images, got one"):
        split(dataset(["a", "a"]), share=0.1)


def test_images_may_be_given_instead() -> None:
    data, others = dataset(["a", "b", "c"]), dataset(["x", "y", "z", "w"])
    parts = split(data, share=0.5, given=EncodedDataset(others.samples[3:]))
    assert parts.training is data
    assert held_out(parts) == {"w"}
    assert parts.note == "validation uses 1 separate image"
    overlapping = split(data, given=others)
    assert "3 of them are trained on too and cannot show overfitting: x, y, z" in overlapping.note
    with pytest.raises(DataError, match="latents of 4 channels like the training images, got 16"):
        split(data, given=dataset(["x"], channels=16))


@given(names=NAMES, share=st.one_of(st.none(), st.floats(0, 0.99)))
def test_the_names_that_will_be_held_out_are_known_before(names: list[str], share: float | None) -> None:
    assert held_out_names(names, share) == held_out(split(dataset(names), share=share))


def test_of_a_single_image_none_is_held_out() -> None:
    for share in [None, 0.0, 0.5]:
        assert held_out_names(["a"], share) == held_out_names([], share) == frozenset()
