"""Encoded samples, and how they are drawn.

A sample has its plain picture and caption. Where it varies, each draw takes one of its encoded pictures and one of its
captions, both functions of the run's seed and the draw's index, like everything else that is random in a draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text, printable
from lorasmith.core.random import keyed_uniform
from lorasmith.data.caption_rules import CaptionRules
from lorasmith.data.encoded_captions import EncodedCaptions
from lorasmith.families.base import Conditioning, PictureSize


@dataclass(frozen=True)
class Picture:
    """One framing of an image, encoded; `latents` and `places` as of `Sample`."""

    latents: Tensor
    size: PictureSize
    places: Tensor | None = None


@dataclass(frozen=True)
class Variants:
    """The pictures and captions among which a sample's draws choose."""

    pictures: tuple[Picture, ...]  # at least one
    captions: tuple[str, ...]  # verbatim; empty for no caption
    rules: CaptionRules
    encoded: EncodedCaptions  # conditionings of all captions
    sized: Callable[[Conditioning, PictureSize], Conditioning]  # adds a picture's sizes to its caption's conditioning

    def caption(self, seed: int, draw: int) -> str:
        return self.rules.drawn(self.captions, seed, draw)

    def picture(self, seed: int, draw: int) -> Picture:
        if len(self.pictures) == 1:
            return self.pictures[0]
        return self.pictures[int(keyed_uniform(seed, "picture", draw) * len(self.pictures))]


@dataclass(frozen=True, repr=False)
class Sample:
    """One image, encoded.

    Attributes:
        latents: fp32 (channels, [frames,] height, width) on the CPU, scaled for the denoiser (`LatentFormat.to_model`).
        conditioning: input of the denoiser, batch of 1.
        name: for messages, usually the file name.
        digest: hash of the inputs of latents and conditioning, if known; the encodings' last bits depend on the device.
        weight: factor of its loss.
        places: weights of its loss by place, fp32 (height, width) of the latents; None for 1 everywhere.
        is_class: whether it shows the subject's class, for prior preservation; such samples are never held out.
        variants: its pictures and captions to draw from; None if every draw is the same.
    """

    latents: Tensor
    conditioning: Conditioning
    name: str
    digest: str = ""
    weight: float = 1.0
    places: Tensor | None = None
    is_class: bool = False
    variants: Variants | None = None

    def __repr__(self) -> str:
        facts = [f"latents {'×'.join(map(str, self.latents.shape))}"]
        if self.conditioning.text is not None:
            facts.append(f"caption {printable(self.conditioning.text, limit=60)!r}")
        facts += [f"weight {self.weight:g}"] if self.weight != 1 else []
        facts += ["of the class"] if self.is_class else []
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

    def sizes(self) -> Iterator[Sample]:
        """The sample with each of its pictures, all with the plain caption."""
        if (variants := self.variants) is None:
            yield self
            return
        for picture in variants.pictures:
            yield self._with(picture, self.conditioning)

    def _with(self, picture: Picture, conditioning: Conditioning) -> Sample:
        return replace(self, latents=picture.latents, places=picture.places, conditioning=conditioning, variants=None)


@dataclass(frozen=True, repr=False)
class EncodedDataset:
    """The samples of a run; a sample with repeats occurs repeatedly.

    Attributes:
        samples: in order.
        captions: conditionings of captions that vary; None if none do.
        notes: remarks for the user, one sentence each.

    Raises:
        DataError: there are no samples, or latents are not (channels, [frames,] height, width), differ in channels, or
            are not finite.
    """

    samples: tuple[Sample, ...]
    captions: EncodedCaptions | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples:
            raise DataError("a dataset needs at least one sample, got none; add some images")
        like = self.samples[0].latents
        for sample in {id(sample): sample for sample in self.samples}.values():
            for one in sample.sizes():
                check_latents(one.latents, like=like, name=one.name)

    def __len__(self) -> int:
        return len(self.samples)

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
            *([f"{len(self.notes)} notes"] if self.notes else []),
        ]
        return f"EncodedDataset({', '.join(facts)})"


def places_of(samples: Sequence[Sample]) -> Tensor | None:
    """The `places` of samples of equal size as (batch, 1, [1,] height, width); None if none has any."""
    if all(sample.places is None for sample in samples):
        return None
    shape = (*(1,) * (samples[0].latents.ndim - 2), *samples[0].latents.shape[-2:])
    weights: Iterable[Tensor] = (
        torch.ones(shape) if one.places is None else one.places.reshape(shape) for one in samples
    )
    return torch.stack(list(weights))


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
