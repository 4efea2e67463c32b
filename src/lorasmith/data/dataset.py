"""Encoded samples, the conditionings of their captions, how they are drawn, and which are held out for validation.

A sample has its plain picture and caption. Where it varies, each draw takes one of its encoded pictures and one of its
captions, both functions of the run's seed and the draw's index, like everything else that is random in a draw.

A run draws finitely many texts where its captions have few variants, and at most one per draw otherwise, so most runs
encode every caption ahead and need no text encoder while they train. Where the conditionings would exceed a given
amount of memory, the text encoder stays loaded, and captions are encoded when they are drawn. Both give the same run.

Held-out images are chosen by name: repeats, mirrored copies, and files of one name in several subfolders are held out
together. The choice depends on the names, not on the run's seed, so that two runs on the same folder have the same
held-out images; adding or removing an image changes at most one or two others.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple, overload

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text, described, printable
from lorasmith.core.random import keyed_uniform
from lorasmith.data.captions import CaptionRules
from lorasmith.data.encoding_cache import CacheEntries, key_of
from lorasmith.families.conditionings import FIRST_FRAME, Conditioning, PictureSize

_TENSOR, _MASK = "tensor.", "mask"
AUTOMATIC_FROM = 12
"""Number of distinct images from which a tenth is held out by default; with fewer, each matters more in training."""

_AUTOMATIC_SHARE = 0.1
_NAMED = 8  # maximum number of names in a sentence


@dataclass(frozen=True)
class SeenPicture:
    """A picture that the text encoder sees beside a caption."""

    key: str  # hash of its pixels' origin
    pixels: Callable[[], Tensor] = field(compare=False)  # reads them: (1, 3, height, width) in [−1, 1]


class SeenCaption(NamedTuple):
    """A caption, and what the text encoder sees beside it."""

    text: str
    pictures: tuple[SeenPicture, ...]

    @classmethod
    def of(cls, text: str, pictures: tuple[SeenPicture, ...]) -> Caption:
        """The caption with these pictures; the text alone where there are none."""
        return cls(text, pictures) if pictures else text


Caption = str | SeenCaption


@dataclass(frozen=True)
class Picture:
    """One framing of an image, encoded; `latents` and `places` as of `Sample`."""

    latents: Tensor
    size: PictureSize
    places: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # `Conditioning.pictures` of it
    seen: tuple[SeenPicture, ...] = ()
    opposite: Tensor | None = None  # latents of the other picture of its pair


@dataclass(frozen=True)
class Variants:
    """The pictures and captions among which a sample's draws choose."""

    pictures: tuple[Picture, ...]  # at least one
    captions: tuple[str, ...]  # verbatim; empty for no caption
    rules: CaptionRules
    encoded: EncodedCaptions  # conditionings of all captions
    sized: Callable[[Conditioning, PictureSize], Conditioning]  # adds a picture's sizes to its caption's conditioning
    control_dropout: float = 0.0  # probability of a draw without controls

    def caption(self, seed: int, draw: int) -> Caption:
        return SeenCaption.of(self.rules.drawn(self.captions, seed, draw), self.picture(seed, draw).seen)

    def picture(self, seed: int, draw: int) -> Picture:
        picture = self.pictures[0]
        if len(self.pictures) > 1:
            picture = self.pictures[int(keyed_uniform(seed, "picture", draw) * len(self.pictures))]
        if self.control_dropout and keyed_uniform(seed, "controls", draw) < self.control_dropout:
            return replace(picture, inputs={}, seen=())
        return picture

    def possible(self, most: int) -> list[Caption] | None:
        """All captions of its draws; None if there may be more than `most`."""
        texts = self.rules.possible(self.captions, most)
        seen = dict.fromkeys([picture.seen for picture in self.pictures] + ([()] if self.control_dropout else []))
        if texts is None or len(texts) * len(seen) > most:
            return None
        return [SeenCaption.of(text, pictures) for pictures in seen for text in sorted(texts)]


@dataclass(frozen=True, repr=False)
class Sample:
    """One image, encoded: by `lorasmith.encode` and `lorasmith.load_dataset`, or made by hand for any denoiser.

    Attributes:
        latents: (channels, [frames,] height, width), of any floating-point type, kept as fp32 on the CPU; scaled for
            the denoiser (`LatentFormat.to_model`), so that their standard deviation is about 1.
        conditioning: input of the denoiser, each tensor with a batch of 1; nothing by default, for models without.
        name: for messages, and what is held out for validation; usually the file name. By default it is made of the
            latents' hash.
        digest: hash of the inputs of latents and conditioning, if known; the encodings' last bits depend on the device.
        weight: factor of its loss.
        places: weights of its loss by place, fp32 (height, width) of the latents; None for 1 everywhere.
        is_class: whether it shows the subject's class, for prior preservation; such samples are never held out.
        variants: its pictures and captions to draw from; None if every draw is the same.
        seen: what the text encoder sees beside its captions.
        opposite: latents of the other picture of its pair, as `latents`, for the setting `pairs`: the low end of a
            slider, or the rejected picture; None without.

    Raises:
        DataError: latents, conditioning or opposite are of another type or shape.
    """

    latents: Tensor
    conditioning: Conditioning = field(default_factory=lambda: Conditioning({}))
    name: str = ""
    digest: str = ""
    weight: float = 1.0
    places: Tensor | None = None
    is_class: bool = False
    variants: Variants | None = None
    seen: tuple[SeenPicture, ...] = ()
    opposite: Tensor | None = None

    def __post_init__(self) -> None:
        latents, conditioning, opposite = self.latents, self.conditioning, self.opposite
        if not isinstance(latents, Tensor) or latents.ndim not in (3, 4) or not latents.is_floating_point():
            raise DataError(
                "latents of a sample must be a tensor of floats (channels, [frames,] height, width), got "
                f"{_shape_text(latents)}; encode a picture with encode, or remove the batch dimension"
            )
        if latents.dtype != torch.float32 or latents.device.type != "cpu" or latents.requires_grad:
            object.__setattr__(self, "latents", latents.detach().to("cpu", torch.float32))
        if opposite is not None:
            if not isinstance(opposite, Tensor) or opposite.shape != latents.shape or not opposite.is_floating_point():
                raise DataError(
                    f"the opposite of a sample must be a tensor of floats {tuple(latents.shape)} as its latents, got "
                    f"{_shape_text(opposite)}; scale both pictures to one size and encode them alike"
                )
            object.__setattr__(self, "opposite", opposite.detach().to("cpu", torch.float32))
        if not isinstance(conditioning, Conditioning):
            raise DataError(
                f"the conditioning of a sample must be a Conditioning, got {_shape_text(conditioning)}; make one: "
                'Conditioning({"context": tensor}) with a tensor (1, tokens, width)'
            )
        for name, tensor in conditioning.tensors.items():
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != (1,):
                raise DataError(
                    f"tensors of a sample's conditioning must have a batch of 1, got {_shape_text(tensor)} as {name}; "
                    "add a dimension in front"
                )
        weight: object = self.weight
        if not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
            raise DataError(f"the weight of a sample must be a number from 0, got {described(self.weight)}")
        if self.places is not None and getattr(self.places, "shape", None) != latents.shape[-2:]:
            raise DataError(
                f"places of a sample must be {tuple(latents.shape[-2:])} as its latents, got {_shape_text(self.places)}"
            )
        if not isinstance(self.name, str):
            raise DataError(f"the name of a sample must be a text, got {described(self.name)}")
        if not self.name:
            content = _digest(self.latents.contiguous().numpy().tobytes(), 4)
            object.__setattr__(self, "name", f"sample {content.hex()}")

    def __repr__(self) -> str:
        facts = [f"latents {'×'.join(map(str, self.latents.shape))}"]
        if self.conditioning.text is not None:
            facts.append(f"caption {printable(self.conditioning.text, limit=60)!r}")
        facts += [f"weight {self.weight:g}"] if self.weight != 1 else []
        facts += ["of the class"] if self.is_class else []
        facts += ["with an opposite"] if self.opposite is not None else []
        facts += ["varies"] if self.variants else []
        return f"Sample({printable(self.name, limit=60)}: {', '.join(facts)})"

    def drawn(self, seed: int, draw: int) -> Sample:
        """The sample of a draw (`draw` is its global index), without variants."""
        if (variants := self.variants) is None:
            return self
        picture = variants.picture(seed, draw)
        conditioning = variants.sized(variants.encoded[variants.caption(seed, draw)], picture.size)
        return self._with(picture, conditioning)

    def latents_drawn(self, seed: int, draw: int) -> Tensor:
        """The latents of a draw; unlike `drawn`, never encodes its caption."""
        return self.latents if self.variants is None else self.variants.picture(seed, draw).latents

    @property
    def size(self) -> int:
        """Numbers in its latents and controls, which the tokens of a forward pass are proportional to."""
        return sum(control.numel() for control in (self.latents, *self.conditioning.controls))

    def size_drawn(self, seed: int, draw: int) -> int:
        """The size of a draw; unlike `drawn`, never encodes its caption."""
        if self.variants is None:
            return self.size
        picture = self.variants.picture(seed, draw)
        return sum(control.numel() for control in (picture.latents, *Conditioning(picture.inputs).controls))

    def sizes(self) -> Iterator[Sample]:
        """The sample with each of its pictures, all with the plain caption."""
        if (variants := self.variants) is None:
            yield self
            return
        for picture in variants.pictures:
            yield self._with(picture, self.conditioning)

    def _with(self, picture: Picture, conditioning: Conditioning) -> Sample:
        conditioning = conditioning.with_pictures(picture.inputs)
        return replace(
            self,
            latents=picture.latents,
            places=picture.places,
            conditioning=conditioning,
            seen=picture.seen,
            opposite=picture.opposite,
            variants=None,
        )


@dataclass(frozen=True, repr=False)
class EncodedDataset:
    """The samples of a run, a sequence of `Sample`; a sample with repeats occurs repeatedly.

    `len`, iteration and indexing are those of the samples; a slice is a dataset.

    Attributes:
        samples: in order.
        captions: conditionings of captions that vary; None if none do.
        notes: remarks for the user, one sentence each.
        origin: where the pictures were, for the record of a run, if they were in no file.
        trigger: in their captions; empty for none.

    Raises:
        DataError: there are no samples, one is something else, or latents are not (channels, [frames,] height, width),
            differ in channels, or are not finite.
    """

    samples: tuple[Sample, ...]
    captions: EncodedCaptions | None = None
    notes: tuple[str, ...] = ()
    origin: str = ""
    trigger: str = ""

    def __post_init__(self) -> None:
        samples: object = self.samples
        if not isinstance(samples, Iterable) or isinstance(samples, str | Mapping | Tensor):
            raise DataError(f"a dataset must have a list of samples, got {described(samples)}; make them with encode")
        object.__setattr__(self, "samples", tuple(samples))
        if not self.samples:
            raise DataError("a dataset needs at least one sample, got none; add some images")
        for number, member in enumerate(self.samples):
            if not isinstance(member, Sample):
                raise DataError(
                    f"a dataset must have samples, got {described(member)} as number {number}; make one with encode"
                )
        encoders = {
            id(sample.variants.encoded): sample.variants.encoded
            for sample in self.samples
            if sample.variants is not None
        }
        if self.captions is None and len(encoders) == 1:  # of samples that were taken from another dataset
            object.__setattr__(self, "captions", *encoders.values())
        like = self.samples[0].latents
        for sample in {id(sample): sample for sample in self.samples}.values():
            for siz in sample.sizes():
                check_latents(siz.latents, like=like, name=siz.name)
                if siz.opposite is not None:
                    check_latents(siz.opposite, like=like, name=f"the opposite of {siz.name}")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedDataset: ...

    def __getitem__(self, index: int | slice) -> Sample | EncodedDataset:
        if isinstance(index, slice):
            return replace(self, samples=self.samples[index])
        return self.samples[index]

    def __repr__(self) -> str:
        images = len({id(sample) for sample in self.samples})
        sizes = Counter("×".join(map(str, sample.latents.shape[-2:])) for sample in self.samples)
        shown = [f"{count} of {size}" for size, count in sizes.most_common(3)] + (["..."] if len(sizes) > 3 else [])
        of_class = sum(sample.is_class for sample in self.samples)
        facts = [
            count_text(len(self.samples), "sample")
            + (f" of {count_text(images, 'image')}" if images != len(self.samples) else ""),
            f"latents {', '.join(shown)}",
            *([f"{of_class} of the class"] if of_class else []),
            *([count_text(len(self.notes), "note")] if self.notes else []),
        ]
        return f"EncodedDataset({', '.join(facts)})"


def places_of(samples: Sequence[Sample]) -> Tensor | None:
    """The `places` of samples of equal size as (batch, 1, [frames,] height, width); None if none has any.

    First frames that are given have weight 0, and the others as much more.
    """
    first_frames = [sample.conditioning.tensors.get(FIRST_FRAME) for sample in samples]
    if all(frame is None for frame in first_frames) and all(sample.places is None for sample in samples):
        return None
    frames = samples[0].latents.shape[1:-2]
    shape = (*(1,) * (1 + len(frames)), *samples[0].latents.shape[-2:])
    weights = [torch.ones(shape) if sample.places is None else sample.places.reshape(shape) for sample in samples]
    for index, clean in enumerate(first_frames):
        if clean is not None:
            count, first = frames.numel(), clean.shape[2]
            after = torch.tensor([0.0] * first + [count / max(1, count - first)] * (count - first))
            weights[index] = weights[index] * after.reshape(1, -1, 1, 1)
        elif any(frame is not None for frame in first_frames):
            weights[index] = weights[index].expand(1, *frames, -1, -1)
    return torch.stack(weights)


def check_latents(latents: Tensor, *, like: Tensor, name: str) -> None:
    """Raise DataError for one picture's latents that are not finite, or differ from `like` in channels or rank."""
    shape = tuple(latents.shape)
    frames = "frames, " if like.ndim == 4 else ""
    if len(shape) not in (3, 4) or len(shape) != like.ndim or shape[0] != len(like):
        raise DataError(
            f"latents must all be ({len(like)}, {frames}height, width), got {shape} for {name}; encode every "
            "image with the same autoencoder"
        )
    if not latents.isfinite().all():
        raise DataError(
            f"latents must be finite, got NaN or infinity for {name}; encode in fp32 or leave the image out"
        )


class EncodedCaptions:
    """Captions and their conditionings (batch of 1, on the CPU).

    `encode` (text, and pixels of what is seen beside it, if anything) is called inside `ready`, a context in which the
    encoder is on its device. `vectors` are the digests of the embedding files that a text names, by name. `entries` is
    a context with the encoder's cache entries, or None. `memory_bytes` is the most that a run's conditionings may take;
    `encoder_bytes` is the encoder's memory.
    """

    def __init__(
        self,
        encode: Callable[..., Conditioning],
        *,
        ready: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        entries: Callable[[], AbstractContextManager[CacheEntries | None]] = contextlib.nullcontext,
        vectors: Callable[[str], Mapping[str, str]] = lambda text: {},
        memory_bytes: int = 2**32,
        encoder_bytes: int = 0,
    ) -> None:
        self.vectors = vectors
        self.memory_bytes = memory_bytes
        self.encoder_bytes = encoder_bytes
        self._encode = encode
        self._ready = ready
        self._entries = entries
        self._known: dict[Caption, Conditioning] = {}
        self._lock = threading.Lock()
        self._left = False
        self.encoded = 0
        """Number of captions that were encoded instead of read from the cache."""

    def __getitem__(self, caption: Caption) -> Conditioning:
        """The conditioning of a caption; encoded now, and not kept, unless it was encoded ahead."""
        if (known := self._known.get(caption)) is not None:
            return known
        if self._left and self._known:
            return replace(next(iter(self._known.values())), text=parts_of(caption).text)
        with self._lock:  # tokenizers and encoders are for one thread
            return self._encoded(caption)

    @contextlib.contextmanager
    def left_to_training(self) -> Iterator[None]:
        """Inside the context, captions that were not encoded ahead have their text alone, and another's tensors."""
        self._left = True
        try:
            yield
        finally:
            self._left = False

    def encode_ahead(self, captions: Collection[Caption], progress: Callable[[int, int], None] | None = None) -> None:
        """Encode captions in order and keep them; `progress` receives (captions done, total)."""
        if not (missing := self.missing(captions)):
            return
        with self._entries() as entries, contextlib.ExitStack() as encoder:
            is_ready = False
            for done, caption in enumerate(missing, start=1):
                text, seen = parts_of(caption)
                beside = {"pictures": [picture.key for picture in seen], "embeddings": self.vectors(text)}
                key = key_of(caption=text, **{name: entry for name, entry in beside.items() if entry})
                conditioning = None if entries is None else _conditioning(text, entries.get(key))
                if conditioning is None:
                    if not is_ready:  # where all are in the cache, the encoder is not even read
                        encoder.enter_context(self._ready())
                        is_ready = True
                    conditioning = self._encoded(caption)
                    self.encoded += 1
                    if entries is not None:
                        entries.put(key, _tensors(conditioning))
                self._known[caption] = conditioning
                if progress:
                    progress(done, len(missing))

    def missing(self, captions: Collection[Caption]) -> list[Caption]:
        return [caption for caption in dict.fromkeys(captions) if caption not in self._known]

    @property
    def bytes_each(self) -> int:
        """Bytes of the largest conditioning so far."""
        return max(
            (sum(tensor.nbytes for tensor in known.tensors.values()) for known in self._known.values()), default=0
        )

    @property
    def most(self) -> int:
        """Estimated number of captions whose conditionings fit in `memory_bytes`."""
        return self.memory_bytes // max(1, self.bytes_each)

    def _encoded(self, caption: Caption) -> Conditioning:
        text, seen = parts_of(caption)
        return self._encode(text, *([[picture.pixels() for picture in seen]] if seen else []))

    def staying(self) -> AbstractContextManager[object]:
        """Context in which the encoder is on its device."""
        return self._ready()


@dataclass(frozen=True)
class Split:
    """A dataset split into training and held-out samples."""

    training: EncodedDataset
    held_out: EncodedDataset | None
    note: str  # a sentence for the user
    is_note_grave: bool = False  # the user should act on it


def split(dataset: EncodedDataset, *, share: float | None = None, given: EncodedDataset | None = None) -> Split:
    """Hold out a share of a dataset's distinct images, or use the `given` separate ones.

    `share` is in [0, 1), rounded up, but never all images; None for a tenth from `AUTOMATIC_FROM` images on and none
    below. DataError if there is only one image to hold a share out of, or the given images' latents have other
    channels.
    """
    if given is not None:
        return _given(dataset, given)
    names = list(dict.fromkeys(sample.name for sample in dataset.samples if not sample.is_class))
    if share is None and len(names) < AUTOMATIC_FROM:
        return Split(
            dataset,
            None,
            f"overfitting cannot be judged: with fewer than {AUTOMATIC_FROM} images (here {len(names)}) none are "
            "held out unless validation_share is set",
        )
    if share == 0:
        return Split(dataset, None, "overfitting cannot be judged: nothing is held out")
    if len(names) < 2:
        raise DataError("holding out a share needs at least two images, got one; add images or set validation_share 0")
    chosen = held_out_names(names, share)
    count = len(chosen)
    held_out = [sample for sample in dataset.samples if sample.name in chosen and not sample.is_class]
    rest = [sample for sample in dataset.samples if sample.name not in chosen or sample.is_class]
    return Split(
        replace(dataset, samples=tuple(rest)),
        EncodedDataset(tuple(held_out)),
        f"{count} of {len(names)} images {'is' if count == 1 else 'are'} held out of training for validation: "
        + _listed([name for name in names if name in chosen]),
    )


def held_out_names(names: Sequence[str], share: float | None = None) -> frozenset[str]:
    """The names that `split` holds out of these distinct names; none of a single one."""
    if share is None:
        share = _AUTOMATIC_SHARE if len(names) >= AUTOMATIC_FROM else 0.0
    if not share or len(names) < 2:
        return frozenset()
    count = max(1, math.ceil(share * len(names) - 1e-9))  # a tenth of 30 is 3 despite rounding
    return frozenset(
        sorted(names, key=lambda name: _digest(f"held out/{name}".encode(), 8))[: min(count, len(names) - 1)]
    )


def parts_of(caption: Caption) -> SeenCaption:
    """A caption as its text and pictures."""
    return SeenCaption(caption, ()) if isinstance(caption, str) else caption


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    mask = {} if conditioning.mask is None else {_MASK: conditioning.mask}
    return {_TENSOR + name: tensor for name, tensor in conditioning.tensors.items()} | mask


def _conditioning(caption: str, tensors: Mapping[str, Tensor] | None) -> Conditioning | None:
    tensors = tensors or {}
    named = {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items() if name.startswith(_TENSOR)}
    if not named:
        return None
    return Conditioning(named, text=caption, mask=tensors.get(_MASK))


def _given(dataset: EncodedDataset, given: EncodedDataset) -> Split:
    ours, theirs = (len(dataset_of.samples[0].latents) for dataset_of in (dataset, given))
    if ours != theirs:
        raise DataError(
            f"validation images need latents of {ours} channels like the training images, got {theirs}; encode both "
            "with the same model"
        )
    trained = {_content(sample) for sample in dataset.samples}
    seen = list(dict.fromkeys(sample.name for sample in given.samples if _content(sample) in trained))
    count = len({sample.name for sample in given.samples})
    note = f"validation uses {count_text(count, 'separate image')}"
    if seen:
        note += (
            f", but {len(seen)} of them {'is' if len(seen) == 1 else 'are'} trained on too and cannot show "
            f"overfitting: {_listed(seen)}"
        )
    return Split(dataset, given, note, is_note_grave=bool(seen))


def _content(sample: Sample) -> bytes:
    return _digest(sample.latents.contiguous().numpy().tobytes(), 16)


def _shape_text(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else described(value)


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
