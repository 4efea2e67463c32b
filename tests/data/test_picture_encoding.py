from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data import picture_encoding
from lorasmith.data.crops import FramedPicture, Framing
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.training.batches import sample_index
from tests.data.encoder_cases import Encoder, add, three_pictures
from tests.launched import LONG_S


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_pictures(tmp_path)


@pytest.mark.parametrize("batch_pixels", [0, 64 * 64, 10**6])
def test_pictures_of_one_size_share_a_batch(folder: Path, batch_pixels: int) -> None:
    for number in range(4, 9):
        add(folder, f"{number}.png", (100, 100), (number, 0, 0), "a dog")
    encoder, plain = Encoder(), Encoder()
    data = encoder.encode(folder, batch_pixels=batch_pixels)
    assert sorted(shape[0] for shape in encoder.shapes) == ([1, 1, 6] if batch_pixels == 10**6 else [1] * 8)
    for one, other in zip(data.samples, plain.encode(folder).samples, strict=True):
        assert one.name == other.name and torch.equal(one.latents, other.latents)


@given(
    st.lists(st.tuples(st.integers(16, 400), st.integers(16, 400)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 100),
)
@settings(max_examples=15)
def test_every_image_is_in_one_bucket_and_once_in_an_epoch(sizes: list[tuple[int, int]], batch: int, seed: int) -> None:
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 8 * min(w, h)] or [(64, 64)]
    images = tuple(ImageFile(Path(f"{n}.png"), w, h, "", "none", digest=f"{n:064}") for n, (w, h) in enumerate(sizes))

    def read(image: ImageFile, digest: str, framings: list[Framing], *rest: object, **options: object) -> object:
        return [FramedPicture(torch.zeros(3, one.height, one.width), None) for one in framings]

    with patch.object(picture_encoding, "framed", read):
        data = Encoder().encode(FolderScan(images, (), (), ()))
        with patch.object(picture_encoding, "_READERS", 1):
            alone = Encoder().encode(FolderScan(images, (), (), ()))
    assert [one.name for one in data.samples] == [f"{n}.png" for n in range(len(sizes))]
    for sample, (width, height) in zip(data.samples, sizes, strict=True):
        rows, columns = (4 * side for side in sample.latents.shape[-2:])
        assert rows * columns <= 64**2 and rows % 16 == columns % 16 == 0
        # Beyond 4:1, the longest bucket of this resolution and step is the nearest.
        assert abs(math.log(columns / rows) - math.log(width / height)) < max(
            0.5, abs(math.log(width / height)) - math.log(16) + 0.01
        )
    draws = len(sizes) * 3
    order = [sample_index(draw, len(sizes), seed) for draw in range(draws)]
    for epoch in range(3):
        assert sorted(order[epoch * len(sizes) : (epoch + 1) * len(sizes)]) == list(range(len(sizes)))
    assert order == [sample_index(draw, len(sizes), seed) for draw in range(draws)]
    assert [one.digest for one in alone.samples] == [one.digest for one in data.samples]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Recording(Encoder):
    """Records the threads of each picture, and the most pictures at a time."""

    def __init__(self, meeting: int = 1) -> None:
        super().__init__()
        self.threads: list[tuple[int, int]] = []
        self.at_a_time = self.most = 0
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(meeting, timeout=LONG_S)

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.at_a_time += 1
            self.most = max(self.most, self.at_a_time)
            self.threads.append((pixels.shape[-1], torch.get_num_threads()))
        if self._meeting.parties > 1:
            self._meeting.wait()  # fails unless so many are encoded at a time
        found = super().image(pixels)
        with self._lock:
            self.at_a_time -= 1
        return found


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("beside_pixels", "at_a_time", "threads"),
    [(0, 1, 4), (64 * 64, 1, 4), (2 * 64 * 64, 2, 2), (3 * 64 * 64, 2, 2), (4 * 64 * 64, 4, 1), (10**6, 4, 1)],
)
def test_pictures_are_encoded_side_by_side_with_equal_shares_of_the_threads(
    tmp_path: Path, beside_pixels: int, at_a_time: int, threads: int
) -> None:
    for number in range(8):
        add(tmp_path, f"{number}.png", (100, 100), (30 * number, 0, 0), "a dog")
    encoder, plain = Recording(meeting=at_a_time), Encoder()
    names: list[str] = []
    data = encoder.encode(
        tmp_path, beside_pixels=beside_pixels, progress=lambda done, total, name, cached: names.append(f"{done} {name}")
    )
    assert encoder.threads == [(64, threads)] * 8
    assert encoder.most == at_a_time
    assert torch.get_num_threads() == 4
    assert names == [f"{number + 1} {number}.png" for number in range(8)]
    for one, other in zip(data.samples, plain.encode(tmp_path).samples, strict=True):
        assert one.name == other.name and torch.equal(one.latents, other.latents)


@pytest.mark.usefixtures("four_threads")
def test_a_pictures_threads_depend_on_its_size_alone(tmp_path: Path) -> None:
    shapes = [(100, 100), (200, 50), (100, 100), (64, 128), (200, 50), (200, 50), (100, 100)]
    for number, size in enumerate(shapes):
        add(tmp_path, f"{number}.png", size, (30 * number, 0, 0), "a dog")
    many = Recording()
    many.encode(tmp_path, beside_pixels=4 * 48 * 80)
    found = dict(many.threads)
    for number, (width, height) in enumerate(shapes):
        alone = Recording()
        folder = tmp_path / str(number)
        add(folder, "1.png", (width, height), (30 * number, 0, 0), "a dog")
        alone.encode(folder, beside_pixels=4 * 48 * 80)
        assert [found[width] for width, _ in alone.threads] == [threads for _, threads in alone.threads]
    assert len(many.threads) == len(shapes)
    assert set(found.values()) == {1, 2}


@pytest.mark.usefixtures("four_threads")
def test_pictures_that_do_not_fit_side_by_side_are_encoded_alone(tmp_path: Path) -> None:
    for number in range(6):
        add(tmp_path, f"{number}.png", (100, 100), (30 * number, 0, 0), "a dog")
    encoder = Encoder()
    plain, lock, meeting = encoder.image, threading.Lock(), threading.Barrier(2, timeout=LONG_S)
    calls: list[float] = []
    failed: list[float] = []
    inside = 0

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        picture = float(pixels[0, 0, 0, 0])
        with lock:
            inside += 1
            calls.append(picture)
            first, second = len(calls) == 1, len(calls) == 2
        try:
            if first or second:
                meeting.wait()
            if second:
                failed.append(picture)
                raise MemoryError
            assert picture not in failed or inside == 1
            return plain(pixels)
        finally:
            with lock:
                inside -= 1

    encoder.image = encode  # type: ignore[method-assign]
    data = encoder.encode(tmp_path, beside_pixels=10**6)
    assert [one.name for one in data.samples] == [f"{number}.png" for number in range(6)]
    assert len(failed) == 1 and calls.count(failed[0]) == 2 and len(calls) == 7


@pytest.mark.usefixtures("four_threads")
def test_threads_are_restored_when_encoding_fails(tmp_path: Path) -> None:
    for number in range(6):
        add(tmp_path, f"{number}.png", (100, 100), (30 * number, 0, 0), "a dog")
    encoder = Encoder()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    encoder.image = encode  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="broken"):
        encoder.encode(tmp_path, beside_pixels=10**6)
    assert torch.get_num_threads() == 4
    assert not [one for one in threading.enumerate() if one.name.startswith("lorasmith")]
