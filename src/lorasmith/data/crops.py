"""Framings of a picture: which part of it is trained, at which size, how it is varied, and its pixels and masks.

The first framing is the plain picture: its bucket at the first resolution, cropped around the centre (or its mask),
neither mirrored nor jittered. The others are variants, one of which is drawn each time. Variants are functions of the
picture's name, not of the run's seed, so that their encodings can be cached and shared between runs.

A bucket has about as many pixels as a square of the training resolution, so that all samples cost about the same, and
nearly the aspect ratio of the picture, so that little is cropped. With `bucket_tokens` all buckets of a resolution have
exactly as many.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.random import keyed_uniform
from lorasmith.data.clips import clip_frames
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import ImageFile
from lorasmith.data.image_files import ImageError, open_layers, open_mask, read_image, to_tensor
from lorasmith.families.conditionings import PictureSize

_VARIANTS_SEED = 0  # a constant; see above
_COLOURS = ("brightness", "contrast", "saturation")


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
            of_one_area=config.bucket_tokens,
        )
        for number in range(config.picture_variants if config.varies_pictures else 1):
            uniform = partial(keyed_uniform, _VARIANTS_SEED, index=f"{name}/{side}/{number}") if number else None
            box = _box((width, height), (columns, rows), config, centre, uniform)
            colours = [
                1.0 if uniform is None else 1 + config.colour_jitter * (2 * uniform(what) - 1) for what in _COLOURS
            ]
            found.append(Framing(columns, rows, box, colours=(colours[0], colours[1], colours[2])))
    if config.flip:
        return tuple(itertools.chain.from_iterable((framing, replace(framing, is_mirrored=True)) for framing in found))
    return tuple(found)


def framings_of(image: ImageFile, config: DataConfig, *, resolution: int, multiple: int) -> tuple[Framing, ...]:
    """The framings of an image file, around its mask with crop mask. Raises DataError, or ImageError for a mask."""
    mask = mask_of(image, config) if config.crop == "mask" else None
    return framings(
        image.width,
        image.height,
        config,
        resolution=resolution,
        multiple=multiple,
        name=image.name,
        centre=(0.5, 0.5) if mask is None else centre_of(mask),
    )


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


def bucket_size(
    width: int,
    height: int,
    *,
    resolution: int,
    multiple: int,
    upscale: bool = True,
    smallest: int | None = None,
    largest: int | None = None,
    of_one_area: bool = False,
) -> tuple[int, int]:
    """Width and height of the bucket for a picture of `width` × `height` px, multiples of `multiple`.

    Their product is at most that of the square bucket (`resolution` rounded down to a multiple) and more than half of
    it. Of all such buckets it is the one that crops least: the one with the smallest |log(a/b)| of the two aspects, as
    scaling to cover keeps min(a/b, b/a) of the picture's area. Without `upscale` the bucket fits inside the picture or,
    if there is none, is the picture's size rounded down; an edge below `multiple` is still enlarged. `smallest` and
    `largest` bound an edge in pixels; `smallest` yields to `upscale=False`. With `of_one_area`, which needs `upscale`,
    all buckets of a resolution have the same product, at least seven eighths of the square bucket's: the one whose
    buckets crop least. A resolution below `multiple` or out of bounds is a DataError.
    """
    if resolution < multiple:
        raise DataError(f"resolution must be at least {multiple} for this model, got {resolution}; raise it")
    longer, shorter = max(width, height), min(width, height)
    # In units of `multiple` from here on, for a wide picture. A wide bucket has as many rows as fit in the area.
    edge = resolution // multiple
    area = edge**2
    fewest, most = -(-(smallest or 1) // multiple), area if largest is None else largest // multiple
    if not fewest <= edge <= most:
        raise DataError(
            f"resolution must be within bucket_min and bucket_max, got {resolution} for edges of {fewest * multiple} "
            f"to {most * multiple} pixels in steps of {multiple}; change one of them"
        )
    candidates: Sequence[int] = range(edge, min(area // fewest, most) + 1)
    if of_one_area:
        area, candidates = _one_area(edge, fewest, most)
    elif not upscale:
        columns, rows = max(1, longer // multiple), max(1, shorter // multiple)
        candidates = range(max(edge, area // (rows + 1) + 1), min(columns, candidates[-1]) + 1)
    if candidates:
        columns = _nearest_aspect(candidates, area, longer / shorter)
        rows = area // columns
    else:
        columns, rows = min(columns, most), min(rows, most)
    return (rows * multiple, columns * multiple) if height > width else (columns * multiple, rows * multiple)


@dataclass(frozen=True)
class FramedPicture:
    """A framing of an image file as tensors."""

    pixels: Tensor  # fp32 (3, [frames,] height, width) in [−1, 1]
    inside: Tensor | None  # fp32 (height, width) of the latents: share of each inside the mask
    mask: Tensor | None = None  # fp32 (height, width) in pixels, 1 inside


def framed(
    image: ImageFile,
    digest: str,
    framings: Sequence[Framing],
    config: DataConfig,
    *,
    downscale: int,
    numbers: Sequence[int] = (),
) -> list[FramedPicture]:
    """The framings of an image file; `downscale` is pixels per latent, `numbers` are the frames of a clip.

    The file is read once, so digest, pixels and transparency are of the same bytes.
    ImageError if the file or its mask can no longer be read, or the file's SHA-256 is not `digest`.
    """
    content = read_image(image.path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ImageError(image.path, "has changed since it was checked; start again when it stays as it is")
    size = (image.width, image.height)
    if numbers:
        opacity = None
        frames: list[list[Tensor]] = [[] for _ in framings]
        for picture in clip_frames(image.path, content, numbers):  # framed at once, as those of a film take gigabytes
            for of_framing, one in zip(frames, framings, strict=True):
                of_framing.append(to_tensor(one.applied(picture, size)))
        pixels = [torch.stack(frame, dim=1) for frame in frames]
    else:
        picture, opacity = open_layers(image.path, content, scale=max(framing.scale for framing in framings))
        pixels = [to_tensor(framing.applied(picture, size)) for framing in framings]
    mask = opacity if config.masks == "alpha" else mask_of(image, config)
    pictures = []
    for one, shown in zip(framings, pixels, strict=True):
        if mask is None:
            pictures.append(FramedPicture(shown, None))
            continue
        sizes = ((one.width // downscale, one.height // downscale), (one.width, one.height))
        inside, whole = (torch.from_numpy(np.array(one.mask_applied(mask, size, of))).float() / 255 for of in sizes)
        pictures.append(FramedPicture(shown, inside, whole))
    return pictures


def mask_of(image: ImageFile, config: DataConfig) -> Image.Image | None:
    """The mask in mode L, white inside; None without one, and for a clip's transparency. Raises ImageError."""
    if config.masks == "alpha":
        return None if image.times else open_layers(image.path)[1]
    return None if image.mask is None else open_mask(image.mask)


def place_weights(inside: Tensor | None, config: DataConfig) -> Tensor | None:
    """Weights of the loss by place, fp32 (height, width); None for 1 everywhere, or if all of them would be 0.

    `inside` is the share of each place inside the mask.
    """
    if inside is None:
        return None
    weights = config.mask_outside + (config.mask_inside - config.mask_outside) * inside
    mean = weights.mean()
    if mean <= 0:
        return None
    return weights / mean if config.mask_normalize else weights


def centred(
    picture: tuple[int, int], size: tuple[int, int], centre: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float, float, float]:
    """The largest part of a picture of width × height px with the aspect ratio of `size`, as `Framing.box`."""
    kept = _kept(picture, size)
    starts = [min(max(c * side - k / 2, 0.0), side - k) for c, side, k in zip(centre, picture, kept, strict=True)]
    return starts[0], starts[1], starts[0] + kept[0], starts[1] + kept[1]


def _kept(picture: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    width, height = picture
    return min(width, height * size[0] / size[1]), min(height, width * size[1] / size[0])


def _box(
    picture: tuple[int, int],
    bucket: tuple[int, int],
    config: DataConfig,
    centre: tuple[float, float],
    uniform: partial[float] | None,
) -> tuple[float, float, float, float]:
    """The part of a picture that is scaled to a bucket; `uniform` supplies a variant's random numbers."""
    plain = centred(picture, bucket, centre)
    if uniform is None:
        return plain
    starts, kept = [plain[0], plain[1]], _kept(picture, bucket)
    if config.crop == "random":
        starts = [uniform(what) * (side - k) for what, side, k in zip(("x", "y"), picture, kept, strict=True)]
    share = 1 - config.crop_jitter * uniform("zoom")
    if not config.upscale:  # a smaller part would have to be enlarged
        share = max(share, min(1.0, bucket[0] / kept[0]))
    cut = tuple(k * share for k in kept)
    moved = (uniform("zoom x"), uniform("zoom y"))
    left, top = (s + u * (k - c) for s, u, k, c in zip(starts, moved, kept, cut, strict=True))
    return left, top, left + cut[0], top + cut[1]


@lru_cache(maxsize=64)  # as each picture asks for it
def _one_area(edge: int, fewest: int, most: int) -> tuple[int, list[int]]:
    """The area of all buckets for a square of `edge`, and the columns of the wide ones.

    Of the areas from seven eighths of the square's, it is the one that crops least where it crops most, over pictures
    from 1:1 to 2:1: 4032 for an edge of 64, with 63×64, 56×72, 48×84 and 42×96.
    """

    def buckets(area: int, longest: int) -> list[int]:
        columns = range(math.isqrt(area - 1) + 1, min(area // fewest, most, longest) + 1)
        return [column for column in columns if area % column == 0]

    def cropped(area: int) -> float:
        logarithms = [math.log(bucket * bucket / area) for bucket in buckets(area, 2 * edge)]
        if not logarithms:
            return math.inf
        middles = [(lower + other) / 2 for lower, other in itertools.pairwise(logarithms)]
        places = [0.0, *(middle for middle in middles if middle < _WIDE), _WIDE]
        return round(max(min(abs(place - middle) for middle in logarithms) for place in places), 6)

    area = min(range(edge**2, -(-7 * edge**2 // 8) - 1, -1), key=cropped)
    return area, buckets(area, area)


_WIDE = math.log(2)  # of the aspect ratio up to which crops are compared


def _nearest_aspect(candidates: Sequence[int], area: int, aspect: float) -> int:
    """The number of columns whose bucket is nearest to `aspect`; aspects increase with the columns."""
    at = bisect_left(candidates, aspect, key=lambda columns: columns / (area // columns))
    return min(
        candidates[max(at - 1, 0) : at + 1], key=lambda columns: abs(math.log(columns / (area // columns) / aspect))
    )
