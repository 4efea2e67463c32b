"""Framings of images as latents: from the cache, or read by threads and encoded.

Files are read, cropped and scaled ahead of the autoencoder. Pictures of one size share a batch up to a number of
pixels; with 0 they are encoded one by one, which makes the bits of each independent of the others. On a CPU several are
encoded at a time, each on its share of the cores: cores that share a picture wait for each other after every layer. The
share, on which the last bits depend, is a function of the picture's size only.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from PIL import __version__ as pillow_version
from torch import Tensor

from lorasmith.core.allocator import is_out_of_memory
from lorasmith.data.clips import ClipForm
from lorasmith.data.crops import FramedPicture, Framing, framed
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import check_latents
from lorasmith.data.encoding_cache import CacheEntries, key_of
from lorasmith.data.folder import ImageFile
from lorasmith.data.image_files import file_digest
from lorasmith.families.conditionings import Conditioning, PictureSize
from lorasmith.families.forms import ControlForm

EncodingProgress = Callable[[int, int, str, int], None]
"""Receives images done, all images, the name of the last one, and the number found in the cache."""

_READERS = 2  # threads; decoding is faster than any autoencoder, which needs the other cores

_AHEAD = 8  # images read ahead

_CLIPS_AHEAD = 2  # of clips, which take 100 MB and more each

_LATENTS, _INSIDE, _BESIDE = "latents", "inside", "beside."


@dataclass(frozen=True, kw_only=True)
class PictureEncoder:
    """An autoencoder and how it is to be used."""

    # pixels (batch, 3, [frames,] height, width) in [−1, 1] → latents (batch, C, [frames,] h, w), scaled for the
    # denoiser
    encode: Callable[[Tensor], Tensor]
    downscale: int  # pixels per latent
    # context in which the encoder is on its device
    ready: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    # context with the encoder's cache entries, or None without a cache
    entries: Callable[[], contextlib.AbstractContextManager[CacheEntries | None]] = contextlib.nullcontext
    batch_pixels: int = 0  # most pixels of a batch
    # most pixels that the CPU encodes at a time, on a share of its threads per picture, with `encode` called from
    # several threads; 0 for one after the other on all threads
    beside_pixels: int = 0
    # adds a picture's sizes to the conditioning of its caption
    sized: Callable[[Conditioning, PictureSize], Conditioning] = lambda conditioning, size: conditioning
    clips: ClipForm | None = None  # that the model accepts; None for image models
    controls: ControlForm | None = None  # that the model accepts; None without
    # pixels (1, 3, [frames,] height, width) and the mask (height, width) of one picture → what the denoiser is given of
    # it, see `Family.picture_inputs`
    picture_inputs: Callable[[Tensor, Tensor | None], Mapping[str, Tensor]] = lambda pixels, inside: {}


@dataclass(frozen=True)
class EncodedFraming:
    """A framing as latents."""

    latents: Tensor  # fp32 (C, [frames,] h, w) on the CPU
    inside: Tensor | None  # fp32 (h, w): share of each latent inside the mask
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 on the CPU, of `Family.picture_inputs`


@dataclass(frozen=True)
class FramedImage:
    """An image with its framings, the plain one first."""

    image: ImageFile
    framings: tuple[Framing, ...]
    digest: tuple[str, str]  # SHA-256 of the file and of its mask, which is `alpha` for transparency, empty for none
    numbers: tuple[int, ...] = ()  # frames of a clip that are trained

    @classmethod
    def of(
        cls, image: ImageFile, framings: Sequence[Framing], config: DataConfig, numbers: tuple[int, ...] = ()
    ) -> FramedImage:
        """The image with digests. Raises ImageError if a file cannot be read."""
        mask = "alpha" if config.masks == "alpha" else "" if image.mask is None else file_digest(image.mask)
        return cls(image, tuple(framings), (image.digest or file_digest(image.path), mask), numbers)

    def keys(self) -> list[str]:
        """Cache keys of the framings."""
        clip = {"frames": self.numbers} if self.numbers else {}
        return [
            key_of(
                picture=self.digest,
                size=[framing.width, framing.height],
                box=framing.box,
                mirrored=framing.is_mirrored,
                colours=framing.colours,
                reader=pillow_version,
                **clip,
            )
            for framing in self.framings
        ]


def encode_pictures(
    images: Sequence[FramedImage], encoder: PictureEncoder, config: DataConfig, progress: EncodingProgress | None = None
) -> list[list[EncodedFraming]]:
    """The encoded framings of each image, in order.

    ImageError if an image or its mask can no longer be read; DataError if latents are not finite.
    """
    with torch.no_grad(), encoder.entries() as entries, contextlib.ExitStack() as ready:
        work = [_Work(image, entries) for image in images]
        lacking = [item for item in work if item.missing]
        done = 0

        def count(item: _Work) -> None:
            nonlocal done
            if len(item.found) == len(item.framed.framings):
                done += 1
                if progress:
                    progress(done, len(work), item.framed.image.name, len(work) - len(lacking))

        for item in work:
            if not item.missing:
                count(item)
        if lacking:
            ready.enter_context(encoder.ready())
        batches = _batches(_read_ahead(lacking, config, encoder.downscale), encoder.batch_pixels)
        with contextlib.closing(_encoded(batches, encoder)) as encoded:
            for batch, latents in encoded:
                for picture, found in zip(batch, latents, strict=True):
                    further = encoder.picture_inputs(picture.picture.pixels[None], picture.picture.mask)
                    _keep(picture, found, further, entries)
                    count(picture.work)
    return [[item.found[index] for index in range(len(item.framed.framings))] for item in work]


class _Work:
    """An image, and which of its framings are encoded."""

    def __init__(self, framed: FramedImage, entries: CacheEntries | None) -> None:
        self.framed = framed
        self.keys = framed.keys() if entries is not None else []
        self.found: dict[int, EncodedFraming] = {}
        for index, key in enumerate(self.keys):
            if entries is not None and (tensors := entries.get(key)) and _LATENTS in tensors:
                further = {
                    name.removeprefix(_BESIDE): tensor for name, tensor in tensors.items() if name.startswith(_BESIDE)
                }
                self.found[index] = EncodedFraming(tensors[_LATENTS], tensors.get(_INSIDE), further)
        self.missing = [index for index in range(len(framed.framings)) if index not in self.found]


@dataclass(frozen=True)
class _Waiting:
    work: _Work
    index: int
    picture: FramedPicture


def _read_ahead(
    lacking: Sequence[_Work], config: DataConfig, downscale: int
) -> Generator[tuple[_Work, list[FramedPicture]]]:
    """Images with their missing framings as pixels, in order, read a few ahead."""

    def read(item: _Work) -> list[FramedPicture]:
        wanted = [item.framed.framings[index] for index in item.missing]
        image, numbers = item.framed.image, item.framed.numbers
        return framed(image, item.framed.digest[0], wanted, config, downscale=downscale, numbers=numbers)

    coming: deque[tuple[_Work, Future[list[FramedPicture]]]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="lorasmith-images") as pool:
        try:
            for item in lacking:
                coming.append((item, pool.submit(read, item)))
                if len(coming) >= (_CLIPS_AHEAD if item.framed.numbers else _AHEAD):
                    first, pictures = coming.popleft()
                    yield first, pictures.result()
            while coming:
                first, pictures = coming.popleft()
                yield first, pictures.result()
        finally:
            for _, pictures in coming:
                pictures.cancel()


def _batches(read: Generator[tuple[_Work, list[FramedPicture]]], batch_pixels: int) -> Generator[Sequence[_Waiting]]:
    """Consecutive pictures of one size with at most `batch_pixels` together; at least one."""
    waiting: dict[tuple[int, ...], list[_Waiting]] = {}
    with contextlib.closing(read):
        for item, pictures in read:
            for index, picture in zip(item.missing, pictures, strict=True):
                shape = tuple(picture.pixels.shape)
                batch = waiting.setdefault(shape, [])
                batch.append(_Waiting(item, index, picture))
                if (len(batch) + 1) * picture.pixels[0].numel() > batch_pixels:
                    yield waiting.pop(shape)
    yield from waiting.values()


def _encoded(
    batches: Generator[Sequence[_Waiting]], encoder: PictureEncoder
) -> Generator[tuple[Sequence[_Waiting], Tensor]]:
    """Batches with their latents, in order; several at a time, see `PictureEncoder.beside_pixels`."""
    threads = torch.get_num_threads()
    with contextlib.closing(batches), contextlib.ExitStack() as stack:
        beside: _Beside | None = None
        for batch in batches:
            share = _share(batch[0].picture.pixels[0].numel(), encoder.beside_pixels, threads)
            if beside is not None and beside.share != share:
                yield from beside.rest()
                stack.close()
                beside = None
            if share == threads:
                yield batch, _latents(batch, encoder)
                continue
            if beside is None:
                beside = stack.enter_context(contextlib.closing(_Beside(encoder, threads, share)))
            yield from beside.add(batch)
        if beside is not None:
            yield from beside.rest()


def _share(pixels: int, beside_pixels: int, threads: int) -> int:
    """Threads for a picture, so that at most `beside_pixels` are encoded at a time; all for a larger one."""
    at_a_time = max(1, min(threads, beside_pixels // pixels))
    return -(-threads // at_a_time)


class _Beside:
    """Encodes batches concurrently, each on `share` of the caller's `threads`.

    Only one may be open, as MKL's number of threads is process-wide.
    """

    def __init__(self, encoder: PictureEncoder, threads: int, share: int) -> None:
        self.share = share
        self._encoder = encoder
        self._threads = threads
        self._at_a_time = threads // share
        self._pool = ThreadPoolExecutor(
            self._at_a_time, "lorasmith-encoding", initializer=torch.set_num_threads, initargs=(share,)
        )
        self._running: deque[tuple[Sequence[_Waiting], Future[Tensor]]] = deque()

    def add(self, batch: Sequence[_Waiting]) -> Iterator[tuple[Sequence[_Waiting], Tensor]]:
        """Submit a batch; returns finished ones once enough are running."""
        self._running.append((batch, self._pool.submit(_latents, batch, self._encoder)))
        while len(self._running) > 2 * self._at_a_time:
            yield self._first()

    def rest(self) -> Iterator[tuple[Sequence[_Waiting], Tensor]]:
        while self._running:
            yield self._first()

    def close(self) -> None:
        """End the threads; batches that have not started are cancelled."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def _first(self) -> tuple[Sequence[_Waiting], Tensor]:
        batch, future = self._running.popleft()
        error = future.exception()
        if error is None:
            return batch, future.result()
        if not is_out_of_memory(error):
            raise error
        del error, future  # whose frames hold memory
        wait([future for _, future in self._running])
        return batch, self._pool.submit(_latents, batch, self._encoder).result()  # alone


@torch.no_grad()
def _latents(batch: Sequence[_Waiting], encoder: PictureEncoder) -> Tensor:
    """The latents of pictures of one size, fp32 on the CPU."""
    return encoder.encode(torch.stack([waiting_picture.picture.pixels for waiting_picture in batch])).to(
        "cpu", torch.float32
    )


def _keep(
    waiting_picture: _Waiting, latents: Tensor, further: Mapping[str, Tensor], entries: CacheEntries | None
) -> None:
    """Store the latents of a framing, also in the cache. Raises DataError if they are not finite."""
    check_latents(latents, like=latents, name=waiting_picture.work.framed.image.name)
    inside = waiting_picture.picture.inside
    waiting_picture.work.found[waiting_picture.index] = EncodedFraming(latents.clone(), inside, further)
    if entries is not None:
        further = {_BESIDE + name: tensor for name, tensor in further.items()}
        entries.put(
            waiting_picture.work.keys[waiting_picture.index],
            {_LATENTS: latents, **({} if inside is None else {_INSIDE: inside}), **further},
        )
