"""Framings of a picture: which part of it is trained, at which size, and how it is varied.

The first framing is the plain picture: its bucket at the first resolution, the centre of it (or the part around its
mask), neither mirrored nor jittered. The others are variants, one of which is drawn each time. Variants are functions
of the picture's name, not of the run's seed, so that their encodings can be kept and shared between runs.
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
    """One way in which a picture is trained.

    Attributes:
        width, height: of the result in pixels.
        box: the part of the upright picture that is kept: left, top, right and bottom in its pixels.
        is_mirrored: whether it is flipped left to right.
        colours: factors of brightness, contrast and saturation.
    """

    width: int
    height: int
    box: tuple[float, float, float, float]
    is_mirrored: bool = False
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def applied(self, picture: Image.Image, of: tuple[int, int]) -> Image.Image:
        """The framed RGB picture: Lanczos with antialiasing, of the kept part alone.

        Args:
            picture: upright; may have been reduced when it was read.
            of: its full width and height, in whose pixels the box is.
        """
        framed = self._resized(picture, of, (self.width, self.height), Image.Resampling.LANCZOS)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, self.colours, strict=True):
            framed = framed if factor == 1.0 else enhancer(framed).enhance(factor)
        return framed

    def mask_applied(self, mask: Image.Image, of: tuple[int, int], size: tuple[int, int]) -> Image.Image:
        """The framed part of a mask (mode L), each pixel the mean of what it covers.

        Args:
            mask: of the whole picture, in any resolution.
            of: width and height of the picture.
            size: width and height of the result, those of the latents.
        """
        return self._resized(mask, of, size, Image.Resampling.BOX)

    @property
    def scale(self) -> float:
        """Pixels of the result per pixel of the picture, the larger one of the two directions."""
        left, top, right, bottom = self.box
        return max(self.width / (right - left), self.height / (bottom - top))

    def picture_size(self, width: int, height: int) -> PictureSize:
        """Sizes and crop as conditions, for a picture of width × height px; mirrored before it is cropped."""
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
    """Every framing of a picture, the plain one first.

    Args:
        width, height: of the upright picture in pixels.
        config: resolutions, buckets, crop and variants.
        resolution: the model's, where `config` has none.
        multiple: sides of buckets are multiples of it; see `pixel_step`.
        name: of the picture, the key of its variants.
        centre: what the crop is centred on, as shares of width and height.

    Raises:
        DataError: the resolution is below `multiple`, or the limits of buckets exclude it.
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
    """The step of buckets: the configured one, or the model's `multiple`. Raises DataError if the model excludes it."""
    step = config.bucket_step or multiple
    if step % multiple:
        raise DataError(f"bucket_step must be a multiple of {multiple} for this model, got {step}; use {multiple}")
    return step


def centre_of(mask: Image.Image) -> tuple[float, float]:
    """The middle of what is inside of a mask, as shares of its width and height; the centre for an empty mask."""
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
    """The part of a picture that is scaled to a bucket; `uniform` gives the random numbers of a variant."""
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
