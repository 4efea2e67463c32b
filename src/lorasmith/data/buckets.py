"""Aspect-ratio buckets: the size that a picture is trained at.

A bucket has about as many pixels as a square of the training resolution, so that every sample costs about the same,
and a shape near the picture's own, so that little is cropped away.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from lorasmith.core.errors import DataError

__all__ = ["bucket_size"]


def bucket_size(width: int, height: int, *, resolution: int, multiple: int, upscale: bool = True) -> tuple[int, int]:
    """Width and height to train a picture of `width` × `height` px at.

    Both are multiples of `multiple`. Their product is at most that of the square bucket (`resolution` rounded down to a
    multiple) and more than half of it. Among the buckets the one whose crop loses least of the picture is taken: the
    one with the smallest |log(a/b)| of the two aspects, as scaling to cover keeps min(a/b, b/a) of the picture's area.

    Args:
        width, height: of the picture, at least 1.
        resolution: edge of the square bucket in pixels.
        multiple: what both edges must divide by; the family's `pixel_multiple` or a multiple of it.
        upscale: False takes only buckets that fit inside the picture, so that it is never enlarged; where there is
            none, the bucket is the picture's own size rounded down. An edge below `multiple` is enlarged all the same.

    Raises:
        DataError: the resolution is below `multiple`.
    """
    if resolution < multiple:
        raise DataError(f"resolution must be at least {multiple} for this model, got {resolution}; raise it")
    if height > width:
        return bucket_size(height, width, resolution=resolution, multiple=multiple, upscale=upscale)[::-1]
    # Counted in multiples from here on. A wide bucket of so many columns has as many rows as fit in the area.
    edge = resolution // multiple
    area = edge**2
    candidates = range(edge, area + 1)
    if not upscale:
        columns, rows = max(1, width // multiple), max(1, height // multiple)
        candidates = range(max(edge, area // (rows + 1) + 1), min(columns, area) + 1)
        if not candidates:
            return columns * multiple, rows * multiple
    columns = _nearest_aspect(candidates, area, width / height)
    return columns * multiple, area // columns * multiple


def _nearest_aspect(candidates: range, area: int, aspect: float) -> int:
    """The number of columns whose bucket comes nearest to `aspect`; aspects rise with the columns."""
    at = bisect_left(candidates, aspect, key=lambda columns: columns / (area // columns))
    return min(
        candidates[max(at - 1, 0) : at + 1],
        key=lambda columns: abs(math.log(columns / (area // columns) / aspect)),
    )
