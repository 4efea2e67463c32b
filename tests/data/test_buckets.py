from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import DataError
from lorasmith.data.crops import bucket_size

sizes = st.integers(1, 5000)
multiples = st.sampled_from([8, 16, 32, 64])
resolutions = st.integers(64, 1200)


def distance(bucket: tuple[int, int], width: int, height: int) -> float:
    return abs(math.log(bucket[0] / bucket[1]) - math.log(width / height))


def all_buckets(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """By brute force: every size of which neither edge can grow within the area."""
    edge = resolution // multiple
    wide = [(w, edge**2 // w) for w in range(edge, edge**2 + 1)]
    return [(w * multiple, h * multiple) for w, h in wide] + [(h * multiple, w * multiple) for w, h in wide]


@given(sizes, sizes, resolutions, multiples)
def test_multiples_area_and_nearest_aspect(width: int, height: int, resolution: int, multiple: int) -> None:
    bucket = bucket_size(width, height, resolution=resolution, multiple=multiple)
    assert bucket[0] % multiple == bucket[1] % multiple == 0 < min(bucket)
    square = resolution // multiple * multiple
    assert square**2 / 2 < math.prod(bucket) <= square**2
    nearest = min(distance(other, width, height) for other in all_buckets(resolution, multiple))
    assert distance(bucket, width, height) == pytest.approx(nearest, abs=1e-9)


@given(sizes, resolutions, multiples)
def test_square_stays_square(edge: int, resolution: int, multiple: int) -> None:
    square = resolution // multiple * multiple
    assert bucket_size(edge, edge, resolution=resolution, multiple=multiple) == (square, square)


@given(sizes, sizes, resolutions, multiples, st.booleans())
def test_turning_the_picture_turns_the_bucket(width, height, resolution, multiple, upscale) -> None:
    options = {"resolution": resolution, "multiple": multiple, "upscale": upscale}
    assert bucket_size(width, height, **options) == bucket_size(height, width, **options)[::-1]


@given(sizes, sizes, resolutions, multiples)
def test_never_enlarged(width: int, height: int, resolution: int, multiple: int) -> None:
    bucket = bucket_size(width, height, resolution=resolution, multiple=multiple, upscale=False)
    assert bucket[0] <= max(width, multiple) and bucket[1] <= max(height, multiple)
    assert bucket[0] % multiple == bucket[1] % multiple == 0 < min(bucket)
    assert math.prod(bucket) <= resolution**2
    fitting = [b for b in all_buckets(resolution, multiple) if b[0] <= width and b[1] <= height]
    if fitting:
        nearest = min(distance(other, width, height) for other in fitting)
        assert distance(bucket, width, height) == pytest.approx(nearest, abs=1e-9)
    elif min(width, height) >= multiple:
        assert bucket == (width // multiple * multiple, height // multiple * multiple)


@pytest.mark.parametrize(
    ("size", "resolution", "multiple", "expected"),
    [
        ((4000, 3000), 64, 16, (80, 48)),
        ((3000, 4000), 64, 16, (48, 80)),
        ((1000, 1000), 64, 16, (64, 64)),
        ((1500, 1000), 512, 64, (640, 384)),
        ((1600, 900), 1024, 64, (1344, 768)),
        ((1000, 1000), 1000, 64, (960, 960)),
    ],
)
def test_examples(size, resolution, multiple, expected) -> None:
    assert bucket_size(*size, resolution=resolution, multiple=multiple) == expected


def test_small_pictures_keep_their_size_when_asked() -> None:
    assert bucket_size(300, 200, resolution=512, multiple=64, upscale=False) == (256, 192)


def test_resolution_below_the_multiple() -> None:
    with pytest.raises(DataError, match="resolution must be at least 64 for this model, got 48; raise it"):
        bucket_size(100, 100, resolution=48, multiple=64)
