"""Framings of images as latents: from the cache where they are, read by threads and encoded where they are not.

Files are read, cropped and scaled ahead of the autoencoder. Pictures of one size share a batch up to a number of
pixels; with 0 they are encoded one by one, which makes the bits of each independent of its neighbours.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from PIL import __version__ as pillow_version
from torch import Tensor

from lorasmith.core.allocator import is_out_of_memory
from lorasmith.data.crops import Framing
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import check_latents
from lorasmith.data.encoding_cache import CacheEntries, key_of
from lorasmith.data.folder import ImageFile
from lorasmith.data.framed_pictures import FramedPicture, framed
from lorasmith.data.image_files import file_digest
from lorasmith.families.base import Conditioning, PictureSize

__all__ = ["EncodedFraming", "FramedImage", "PictureEncoder", "encode_pictures"]

Progress = Callable[[int, int, str], None]

_READERS = 2
"""Threads that read: decoding is faster than any autoencoder, which needs the other cores."""

_AHEAD = 8
"""Images that are read ahead."""

_LATENTS, _INSIDE = "latents", "inside"


@dataclass(frozen=True, kw_only=True)
class PictureEncoder:
    """What encodes pictures.

    Attributes:
        encode: pixels (batch, 3, height, width) in [−1, 1] → latents (batch, C, [frames,] h, w), scaled for the
            denoiser.
        downscale: pixels per latent.
        ready: context in which the encoder is where it runs, for many pictures in a row.
        entries: context with the encoder's entries of the cache, or None without one.
        batch_pixels: most pixels of a batch.
        sized: adds a picture's sizes to the conditioning of its caption.
    """

    encode: Callable[[Tensor], Tensor]
    downscale: int
    ready: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    entries: Callable[[], contextlib.AbstractContextManager[CacheEntries | None]] = contextlib.nullcontext
    batch_pixels: int = 0
    sized: Callable[[Conditioning, PictureSize], Conditioning] = lambda conditioning, size: conditioning


@dataclass(frozen=True)
class EncodedFraming:
    """A framing as latents.

    Attributes:
        latents: fp32 (C, [frames,] h, w) on the CPU.
        inside: fp32 (h, w) in [0, 1], how much of each latent is inside of the mask; None without one.
    """

    latents: Tensor
    inside: Tensor | None


@dataclass(frozen=True)
class FramedImage:
    """An image with its framings.

    Attributes:
        image: the scanned file.
        framings: of it, the plain one first.
        digest: SHA-256 of the file, and that of its mask, `alpha` for its own transparency, or nothing.
    """

    image: ImageFile
    framings: tuple[Framing, ...]
    digest: tuple[str, str]

    @classmethod
    def of(cls, image: ImageFile, framings: Sequence[Framing], config: DataConfig) -> FramedImage:
        """The image with digests. Raises ImageError if a file cannot be read."""
        mask = "alpha" if config.masks == "alpha" else "" if image.mask is None else file_digest(image.mask)
        return cls(image, tuple(framings), (image.digest or file_digest(image.path), mask))

    def keys(self) -> list[str]:
        """Keys of the framings in the cache."""
        return [
            key_of(
                picture=self.digest,
                size=[one.width, one.height],
                box=one.box,
                mirrored=one.is_mirrored,
                colours=one.colours,
                reader=pillow_version,
            )
            for one in self.framings
        ]


def encode_pictures(
    images: Sequence[FramedImage],
    encoder: PictureEncoder,
    config: DataConfig,
    progress: Progress | None = None,
) -> list[list[EncodedFraming]]:
    """The framings of each image, in order.

    Args:
        images: with their framings.
        encoder: what encodes.
        config: says where masks are.
        progress: called after each image with (images done, total, its name).

    Raises:
        ImageError: an image or its mask can no longer be read.
        DataError: an image's latents are not finite.
    """
    with torch.no_grad(), encoder.entries() as entries, contextlib.ExitStack() as ready:
        work = [_Work(one, entries) for one in images]
        lacking = [one for one in work if one.missing]
        count = _Counter(len(work), progress)
        for one in work:
            if not one.missing:
                count(one)
        if lacking:
            ready.enter_context(encoder.ready())
        waiting: dict[tuple[int, ...], list[_Waiting]] = {}
        for one, pictures in _read_ahead(lacking, config, encoder.downscale):
            for index, picture in zip(one.missing, pictures, strict=True):
                batch = waiting.setdefault(tuple(picture.pixels.shape), [])
                batch.append(_Waiting(one, index, picture))
                pixels = picture.pixels[0].numel()
                if (len(batch) + 1) * pixels > encoder.batch_pixels:
                    _encode(waiting.pop(tuple(picture.pixels.shape)), encoder, entries, count)
        for batch in waiting.values():
            _encode(batch, encoder, entries, count)
    return [[one.found[index] for index in range(len(one.framed.framings))] for one in work]


class _Work:
    """An image, and which of its framings are encoded."""

    def __init__(self, framed: FramedImage, entries: CacheEntries | None) -> None:
        self.framed = framed
        self.keys = framed.keys() if entries is not None else []
        self.found: dict[int, EncodedFraming] = {}
        for index, key in enumerate(self.keys):
            if entries is not None and (tensors := entries.get(key)) is not None:
                self.found[index] = EncodedFraming(tensors[_LATENTS], tensors.get(_INSIDE))
        self.missing = [index for index in range(len(framed.framings)) if index not in self.found]


@dataclass
class _Counter:
    """Reports images of which every framing is encoded."""

    total: int
    progress: Progress | None
    done: int = field(default=0, init=False)

    def __call__(self, one: _Work) -> None:
        if len(one.found) == len(one.framed.framings):
            self.done += 1
            if self.progress:
                self.progress(self.done, self.total, one.framed.image.name)


@dataclass(frozen=True)
class _Waiting:
    """A framing that was read."""

    work: _Work
    index: int
    picture: FramedPicture


def _read_ahead(
    lacking: Sequence[_Work], config: DataConfig, downscale: int
) -> Iterator[tuple[_Work, list[FramedPicture]]]:
    """Images with their missing framings as pixels, in order, read a few ahead."""

    def read(one: _Work) -> list[FramedPicture]:
        wanted = [one.framed.framings[index] for index in one.missing]
        return framed(one.framed.image, one.framed.digest[0], wanted, config, downscale=downscale)

    coming: deque[tuple[_Work, Future[list[FramedPicture]]]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="lorasmith-images") as pool:
        try:
            for one in lacking:
                coming.append((one, pool.submit(read, one)))
                if len(coming) >= _AHEAD:
                    first, pictures = coming.popleft()
                    yield first, pictures.result()
            while coming:
                first, pictures = coming.popleft()
                yield first, pictures.result()
        finally:
            for _, pictures in coming:
                pictures.cancel()


def _encode(
    batch: Sequence[_Waiting], encoder: PictureEncoder, entries: CacheEntries | None, count: Callable[[_Work], None]
) -> None:
    """Encode pictures of one size, in halves where memory runs out."""
    try:
        latents = encoder.encode(torch.stack([one.picture.pixels for one in batch])).to("cpu", torch.float32)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
        latents = None
    if latents is None:  # outside of `except`, where the error's frames no longer hold memory
        middle = len(batch) // 2
        _encode(batch[:middle], encoder, entries, count)
        _encode(batch[middle:], encoder, entries, count)
        return
    for one, found in zip(batch, latents, strict=True):
        name = one.work.framed.image.name
        check_latents(found, like=found, name=name)
        inside = one.picture.inside
        one.work.found[one.index] = EncodedFraming(found.clone(), inside)
        if entries is not None:
            entries.put(one.work.keys[one.index], {_LATENTS: found} | ({} if inside is None else {_INSIDE: inside}))
        count(one.work)
