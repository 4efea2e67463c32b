"""Framings of a picture: which part of it is trained, at which size, and how it is varied.

The first framing is the plain picture: its bucket at the first resolution, cropped around the centre (or its mask),
neither mirrored nor jittered. The others are variants, one of which is drawn each time. Variants are functions of the
picture's name, not of the run's seed, so that their encodings can be cached and shared between runs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from lorasmith.core.errors import DataError
from lorasmith.core.random import keyed_uniform
from lorasmith.data.buckets import bucket_size
from lorasmith.data.data_config import DataConfig
from lorasmith.families.base import PictureSize

_VARIANTS_SEED = 0  # a constant; see above


@dataclass(frozen=True)
class Framing:
    """One way in which a picture is trained, at `width` × `height` px."""

    width: int
    height: int
    box: tuple[float, float, float, float]  # kept part of the upright picture, in its pixels: left, top, right, bottom
    is_mirrored: bool = False  # left to right
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factors of brightness, contrast and saturation

    def applied(self, picture: Image.Image, of: tuple[int, int]) -> Image.Image:
        """The framed RGB picture, the kept part scaled by Lanczos with antialiasing.

        `picture` is upright and may be reduced; `of` is its full width and height, in whose pixels the box is.
        """
        framed = self._resized(picture, of, (self.width, self.height), Image.Resampling.LANCZOS)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, self.colours, strict=True):
            framed = framed if factor == 1.0 else enhancer(framed).enhance(factor)
        return framed

    def mask_applied(self, mask: Image.Image, of: tuple[int, int], size: tuple[int, int]) -> Image.Image:
        """The framed part of a mask (mode L, any resolution) at the latents' `size`, each pixel its area's mean."""
        return self._resized(mask, of, size, Image.Resampling.BOX)

    @property
    def scale(self) -> float:
        """Pixels of the result per pixel of the picture, the larger of both directions."""
        left, top, right, bottom = self.box
        return max(self.width / (right - left), self.height / (bottom - top))

    def picture_size(self, width: int, height: int) -> PictureSize:
        """SDXL's size and crop conditions for a picture of width × height px, mirrored before it is cropped."""
        left, top, right, bottom = self.box
        beside = width - right if self.is_mirrored else left
        return PictureSize(
            original=(height, width),
            crop=(round(top * self.height / (bottom - top)), round(beside * self.width / (right - left))),
            target=(self.height, self.width),
        )

    def _resized(
        self, picture: Image.Image, of: tuple[int, int], size: tuple[int, int], method: Image.Resampling
    ) -> Image.Image:
        x, y = picture.width / of[0], picture.height / of[1]
        left, top, right, bottom = self.box
        box = (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))
        framed = picture.resize(size, method, box=box)
        return ImageOps.mirror(framed) if self.is_mirrored else framed


def framings(
    width: int,
    height: int,
    config: DataConfig,
    *,
    resolution: int,
    multiple: int,
    name: str,
    centre: tuple[float, float] = (0.5, 0.5),
) -> tuple[Framing, ...]:
    """Every framing of an upright picture, the plain one first.

    `resolution` is the model's, for a `config` without one; sides are multiples of `multiple` (`pixel_step`); the
    variants are seeded by `name`; `centre` of the crop is in shares of width and height. DataError if `resolution` is
    below `multiple` or outside the bucket limits.
    """
    found: list[Framing] = []
    for side in config.all_resolutions(resolution):
        columns, rows = bucket_size(
            width,
            height,
            resolution=side,
            multiple=multiple,
            upscale=config.upscale,
            smallest=config.bucket_min,
            largest=config.bucket_max,
        )
        for number in range(config.picture_variants if config.varies_pictures else 1):
            uniform = partial(keyed_uniform, _VARIANTS_SEED, index=f"{name}/{side}/{number}") if number else None
            box = _box((width, height), (columns, rows), config, centre, uniform)
            colours = [
                1.0 if uniform is None else 1 + config.colour_jitter * (2 * uniform(what) - 1) for what in _COLOURS
            ]
            found.append(Framing(columns, rows, box, colours=(colours[0], colours[1], colours[2])))
    if config.flip:
        return tuple(itertools.chain.from_iterable((one, replace(one, is_mirrored=True)) for one in found))
    return tuple(found)


def pixel_step(config: DataConfig, multiple: int) -> int:
    """The step of buckets: the configured one, which must be a multiple of the model's (DataError), or the model's."""
    step = config.bucket_step or multiple
    if step % multiple:
        raise DataError(f"bucket_step must be a multiple of {multiple} for this model, got {step}; use {multiple}")
    return step


def centre_of(mask: Image.Image) -> tuple[float, float]:
    """The centre of the white area of a mask, in shares of width and height; (0.5, 0.5) if it is empty."""
    inside = np.asarray(mask) > 127
    sides = []
    for axis in (0, 1):
        places = np.flatnonzero(inside.any(axis=axis))
        size = inside.shape[1 - axis]
        sides.append((places[0] + places[-1] + 1) / (2 * size) if len(places) else 0.5)
    return float(sides[0]), float(sides[1])


_COLOURS = ("brightness", "contrast", "saturation")


def _box(
    picture: tuple[int, int],
    bucket: tuple[int, int],
    config: DataConfig,
    centre: tuple[float, float],
    uniform: partial[float] | None,
) -> tuple[float, float, float, float]:
    """The part of a picture that is scaled to a bucket; `uniform` supplies a variant's random numbers."""
    width, height = picture
    kept = (min(width, height * bucket[0] / bucket[1]), min(height, width * bucket[1] / bucket[0]))
    starts = [min(max(c * side - k / 2, 0.0), side - k) for c, side, k in zip(centre, picture, kept, strict=True)]
    if uniform is None:
        return starts[0], starts[1], starts[0] + kept[0], starts[1] + kept[1]
    if config.crop == "random":
        starts = [uniform(what) * (side - k) for what, side, k in zip(("x", "y"), picture, kept, strict=True)]
    share = 1 - config.crop_jitter * uniform("zoom")
    if not config.upscale:  # a smaller part would have to be enlarged
        share = max(share, min(1.0, bucket[0] / kept[0]))
    cut = tuple(k * share for k in kept)
    moved = (uniform("zoom x"), uniform("zoom y"))
    left, top = (s + u * (k - c) for s, u, k, c in zip(starts, moved, kept, cut, strict=True))
    return left, top, left + cut[0], top + cut[1]
