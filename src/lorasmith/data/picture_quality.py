"""Picture quality from pixels: whether a picture is blurred, shows anything, or nearly equals another one.

Sharpness is measured as by Crete et al. 2007 (SPIE 6492, "The blur effect"): blurring a picture again removes most of
the differences between neighbouring pixels if it was sharp, and few if it was blurred. Unlike the variance of the
Laplacian it depends on neither contrast nor subject. It is measured by tiles, of which the sharpest count, so that a
sharp subject before a blurred background is sharp.

Pictures are compared by perceptual hashes (signs of the lowest frequencies of their cosine transform), and candidates
by their small grey copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageStat

MEASURED_EDGE = 512  # longer edge in pixels; larger pictures are reduced before measuring

BLURRED = 0.6
"""Blur from which a picture counts as blurred.

Photographs and drawings in focus have 0.1 to 0.3, copies of them blurred by a Gaussian of 3 pixels at 512 0.6 to 0.8.
"""

_TILES = 4  # in each direction
_LEAST_TILE = 16  # pixels
_BOX = 4  # radius of the second blur: 9 pixels
_LEAST_CHANGE = 1.0  # mean difference of neighbouring pixels in a tile that can be judged, of 255
_EMPTY, _CONTRAST = 3.0, 8.0  # standard deviation of grey levels: below, nothing is shown; above, something is
_STEP = 10  # of neighbouring pixels that even a faint edge exceeds
_HASHED, _FREQUENCIES = 32, 8
_COMPARED = _HASHED // 2
_NEAR_HASH = 14  # of 64 bits
_NEAR_COPY = 0.92  # correlation of the small copies
_ROWS = 512  # of hashes compared at a time


@dataclass(frozen=True)
class PictureQuality:
    """Measurements of a picture."""

    blur: float | None  # from 0, sharp, to 1, blurred; None if there is too little contrast
    is_empty: bool  # of one colour
    hash: int  # 64 bits, most of which similar pictures share
    small: bytes  # grey copy of 16×16 pixels, row by row

    @property
    def is_blurred(self) -> bool:
        return self.blur is not None and self.blur >= BLURRED


def measured(picture: Image.Image) -> PictureQuality:
    """The quality of a picture of any mode and size, reduced to `MEASURED_EDGE` if it is larger."""
    grey = picture.convert("L")
    grey.thumbnail((MEASURED_EDGE, MEASURED_EDGE), Image.Resampling.HAMMING)
    small = np.asarray(grey.resize((_HASHED, _HASHED), Image.Resampling.BOX), dtype=np.float64)
    copy = small.reshape(_COMPARED, 2, _COMPARED, 2).mean(axis=(1, 3)).round().astype(np.uint8).tobytes()
    (deviation,) = ImageStat.Stat(grey).stddev
    if deviation < _EMPTY:
        return PictureQuality(None, True, _perceptual_hash(small), copy)
    blur = _blur(grey)
    if blur is None and deviation >= _CONTRAST and _greatest_step(grey) < _STEP:
        blur = 1.0
    return PictureQuality(blur, False, _perceptual_hash(small), copy)


def look_alikes(qualities: Sequence[PictureQuality]) -> list[list[int]]:
    """Groups of similar pictures, as ascending indices; pictures without similar ones are omitted.

    Copies that were scaled, stretched, recompressed or brightened are similar; mirrored ones are not, and cropped ones
    only where little was removed. Empty pictures match none.
    """
    indexes = [index for index, quality in enumerate(qualities) if not quality.is_empty]
    if len(indexes) < 2:
        return []
    bits = np.array([[qualities[index].hash >> bit & 1 for bit in range(64)] for index in indexes], dtype=np.float32)
    copies = np.stack([_standardised(qualities[index].small) for index in indexes])
    leaders = list(range(len(indexes)))

    def leader(index: int) -> int:
        while leaders[index] != index:
            leaders[index] = leaders[leaders[index]]
            index = leaders[index]
        return index

    # With bits as ±1 a matrix product counts the equal ones, which is exact in fp32.
    signs = 2 * bits - 1
    for start in range(0, len(indexes), _ROWS):
        block = signs[start : start + _ROWS]
        near = block @ signs[start:].T >= 64 - 2 * _NEAR_HASH
        for row, column in np.argwhere(np.triu(near, k=1)):
            first, second = start + int(row), start + int(column)
            if leader(first) != leader(second) and float(copies[first] @ copies[second]) >= _NEAR_COPY:
                low, high = sorted((leader(first), leader(second)))
                leaders[high] = low
    groups: dict[int, list[int]] = {}
    for index in range(len(indexes)):
        groups.setdefault(leader(index), []).append(indexes[index])
    return [group for group in groups.values() if len(group) > 1]


def _blur(grey: Image.Image) -> float | None:
    """Blur of the sharpest tiles; None if no tile has enough contrast."""
    if min(grey.size) < 2:
        return None
    means = []
    for step_x, step_y in ((1, 0), (0, 1)):
        before = _differences(grey, step_x, step_y)
        again = grey.filter(ImageFilter.BoxBlur((_BOX * step_x, _BOX * step_y)))
        lost = ImageChops.subtract(before, _differences(again, step_x, step_y))
        means.append((_tile_means(before), _tile_means(lost)))
    changes, removed = (change + other for change, other in zip(*means, strict=True))
    judged = changes >= 2 * _LEAST_CHANGE
    if not np.any(judged):
        return None
    blurs = np.sort(1 - removed[judged] / changes[judged])
    return float(blurs[min(2, len(blurs) - 1)])  # a single tile may hold a caption or a frame


def _greatest_step(grey: Image.Image) -> int:
    if min(grey.size) < 2:
        return 255
    return max(int(_differences(grey, *step).getextrema()[1]) for step in ((1, 0), (0, 1)))  # type: ignore[arg-type]


def _differences(grey: Image.Image, step_x: int, step_y: int) -> Image.Image:
    """Absolute differences of neighbouring pixels in one direction, (height − 1, width − 1)."""
    width, height = grey.width - 1, grey.height - 1
    neighbours = grey.crop((step_x, step_y, step_x + width, step_y + height))
    return ImageChops.difference(grey.crop((0, 0, width, height)), neighbours)


def _tile_means(grey: Image.Image) -> NDArray[Any]:
    """Mean of each of at most 4×4 tiles."""
    levels = np.asarray(grey).astype(np.float32)
    rows, columns = (_averages(length) for length in levels.shape)
    return rows @ levels @ columns.T


@lru_cache(maxsize=2048)
def _averages(length: int) -> NDArray[np.float32]:
    """A matrix that averages over the tiles of an edge."""
    edges = np.linspace(0, length, min(max(length // _LEAST_TILE, 1), _TILES) + 1).astype(int)
    matrix = np.zeros((len(edges) - 1, length), dtype=np.float32)
    for row, (start, end) in enumerate(pairwise(edges)):
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def _perceptual_hash(grey: NDArray[np.float64]) -> int:
    """64 bits: which of the lowest frequencies are above their median, without the mean brightness."""
    cosines = _cosines()
    frequencies = (cosines @ grey @ cosines.T).ravel()
    frequencies[0] = 0.0
    return int.from_bytes(np.packbits(frequencies > np.median(frequencies)).tobytes(), "big")


@cache
def _cosines() -> NDArray[np.float64]:
    """The first rows of the discrete cosine transform."""
    row, column = np.arange(_FREQUENCIES)[:, None], np.arange(_HASHED)[None]
    return np.cos(np.pi * (column + 0.5) * row / _HASHED)


def _standardised(small: bytes) -> NDArray[np.float32]:
    """The small copy with mean 0 and norm 1, so that products are correlations."""
    levels = np.frombuffer(small, dtype=np.uint8).astype(np.float32)
    levels = levels - levels.mean(dtype=np.float32)
    length = float(np.linalg.norm(levels))
    return np.asarray(levels / (length or 1), dtype=np.float32)
