"""Aspect-ratio buckets: the sizes at which pictures are trained.

A bucket has about as many pixels as a square of the training resolution, so that all samples cost about the same, and
nearly the aspect ratio of the picture, so that little is cropped.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from lorasmith.core.errors import DataError


def bucket_size(
    width: int,
    height: int,
    *,
    resolution: int,
    multiple: int,
    upscale: bool = True,
    smallest: int | None = None,
    largest: int | None = None,
) -> tuple[int, int]:
    """Width and height of the bucket for a picture of `width` × `height` px, multiples of `multiple`.

    Their product is at most that of the square bucket (`resolution` rounded down to a multiple) and more than half of
    it. Of all such buckets it is the one that crops least: the one with the smallest |log(a/b)| of the two aspects, as
    scaling to cover keeps min(a/b, b/a) of the picture's area. Without `upscale` the bucket fits inside the picture or,
    if there is none, is the picture's size rounded down; an edge below `multiple` is still enlarged. `smallest` and
    `largest` bound an edge in pixels; `smallest` yields to `upscale=False`. A resolution below `multiple` or out of
    bounds is a DataError.
    """
    if resolution < multiple:
        raise DataError(f"resolution must be at least {multiple} for this model, got {resolution}; raise it")
    if height > width:
        turned = bucket_size(
            height,
            width,
            resolution=resolution,
            multiple=multiple,
            upscale=upscale,
            smallest=smallest,
            largest=largest,
        )
        return turned[::-1]
    # In units of `multiple` from here on. A wide bucket has as many rows as fit in the area.
    edge = resolution // multiple
    area = edge**2
    fewest, most = -(-(smallest or 1) // multiple), area if largest is None else largest // multiple
    if not fewest <= edge <= most:
        raise DataError(
            f"resolution must be within bucket_min and bucket_max, got {resolution} for edges of {fewest * multiple} "
            f"to {most * multiple} pixels in steps of {multiple}; change one of them"
        )
    candidates = range(edge, min(area // fewest, most) + 1)
    if not upscale:
        columns, rows = max(1, width // multiple), max(1, height // multiple)
        candidates = range(max(edge, area // (rows + 1) + 1), min(columns, candidates[-1]) + 1)
        if not candidates:
            return min(columns, most) * multiple, min(rows, most) * multiple
    columns = _nearest_aspect(candidates, area, width / height)
    return columns * multiple, area // columns * multiple


def _nearest_aspect(candidates: range, area: int, aspect: float) -> int:
    """The number of columns whose bucket is nearest to `aspect`; aspects increase with the columns."""
    at = bisect_left(candidates, aspect, key=lambda columns: columns / (area // columns))
    return min(
        candidates[max(at - 1, 0) : at + 1],
        key=lambda columns: abs(math.log(columns / (area // columns) / aspect)),
    )
