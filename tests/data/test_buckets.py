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


def test_examples() -> None:
    for size, resolution, multiple, expected in [
        ((4000, 3000), 64, 16, (80, 48)),
        ((3000, 4000), 64, 16, (48, 80)),
        ((1000, 1000), 64, 16, (64, 64)),
        ((1500, 1000), 512, 64, (640, 384)),
        ((1600, 900), 1024, 64, (1344, 768)),
        ((1000, 1000), 1000, 64, (960, 960)),
    ]:
        assert bucket_size(*size, resolution=resolution, multiple=multiple) == expected


def test_small_pictures_keep_their_size_when_asked() -> None:
    assert bucket_size(300, 200, resolution=512, multiple=64, upscale=False) == (256, 192)


def test_resolution_below_the_multiple() -> None:
    with pytest.raises(DataError, match="resolution must be at least 64 for this model, got 48; raise it"):
        bucket_size(100, 100, resolution=48, multiple=64)


@given(sizes, sizes, resolutions, multiples)
def test_buckets_of_one_area(width: int, height: int, resolution: int, multiple: int) -> None:
    found = [
        bucket_size(*size, resolution=resolution, multiple=multiple, of_one_area=True)
        for size in [(width, height), (height, width), (1, 1), (5, 1)]
    ]
    (area,) = {math.prod(one) for one in found}
    square = (resolution // multiple * multiple) ** 2
    assert square * 7 / 8 <= area <= square
    assert all(side % multiple == 0 for one in found for side in one)
    assert width == height or found[0] == found[1][::-1]
    count = area // multiple**2
    nearest = min(distance((one, count // one), width, height) for one in range(1, count + 1) if not count % one)
    assert distance(found[0], width, height) == pytest.approx(nearest, abs=1e-9)


def test_a_quarter_is_cropped_at_most_up_to_two_to_one() -> None:
    for resolution, multiple in [(512, 16), (768, 16), (1024, 16), (1024, 32), (1328, 16)]:
        for width in range(1000, 2001, 20):
            bucket = bucket_size(width, 1000, resolution=resolution, multiple=multiple, of_one_area=True)
            assert math.exp(-distance(bucket, width, 1000)) > 0.75


def test_the_buckets_of_a_megapixel_have_4032_tokens() -> None:
    options = {"resolution": 1024, "multiple": 16, "of_one_area": True}
    found = {bucket_size(width, 1000, **options) for width in range(1000, 2600, 10)}
    tokens = {(width // 16, height // 16) for width, height in found}
    assert tokens == {(64, 63), (72, 56), (84, 48), (96, 42)}
    wide, square = (bucket_size(width, 1000, **options, largest=1024) for width in (3000, 1000))
    assert max(wide) <= 1024 and math.prod(wide) == math.prod(square), "limits choose another area"
