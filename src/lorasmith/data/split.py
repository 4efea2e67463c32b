"""Which images are held out of training, so that a run can be judged on pictures that it has not seen.

An image is known by its name: repeats and mirrored copies of it, and files of one name in several subfolders, are held
out together. Which ones is a function of the names alone, not of the run's seed, so that two runs on the same folder
are judged on the same images; and an image more or less moves at most one or two others.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from lorasmith.core.errors import DataError
from lorasmith.data.dataset import EncodedDataset, Sample

__all__ = ["AUTOMATIC_FROM", "Split", "split"]

AUTOMATIC_FROM = 12
"""Distinct images from which a tenth is held out when nothing is said: below, each one is worth more in training."""

_AUTOMATIC_SHARE = 0.1
_NAMED = 8  # how many names a sentence lists


@dataclass(frozen=True)
class Split:
    """A dataset in two parts.

    Attributes:
        training: what is trained on.
        held_out: what is not, None if that is nothing.
        note: what was decided and what follows from it, in a sentence.
    """

    training: EncodedDataset
    held_out: EncodedDataset | None
    note: str


def split(dataset: EncodedDataset, *, share: float | None = None, given: EncodedDataset | None = None) -> Split:
    """Hold images out of a dataset, or take the ones that are given for it.

    Args:
        dataset: all samples.
        share: of the distinct images, in [0, 1); rounded up, but never all of them. 0 holds nothing out; None is a
            tenth from `AUTOMATIC_FROM` images on and nothing below.
        given: images to judge by instead; nothing is then taken from `dataset`.

    Raises:
        DataError: there is only one image to hold a share out of; the given images' latents have another channel count.
    """
    if given is not None:
        return _given(dataset, given)
    names = list(dict.fromkeys(sample.name for sample in dataset.samples))
    if share is None:
        share = _AUTOMATIC_SHARE if len(names) >= AUTOMATIC_FROM else 0.0
        if not share:
            return Split(
                dataset,
                None,
                f"overfitting cannot be judged: nothing is held out of fewer than {AUTOMATIC_FROM} images unless "
                f"asked for, and there {'is' if len(names) == 1 else 'are'} {len(names)}",
            )
    if not share:
        return Split(dataset, None, "overfitting cannot be judged: nothing is held out")
    if len(names) < 2:
        raise DataError("holding out a share needs at least two images, got one; add images or hold out nothing")
    count = min(math.ceil(share * len(names) - 1e-9), len(names) - 1)  # a tenth of 30 is 3 in spite of rounding
    chosen = set(sorted(names, key=_place)[:count])
    held_out = [sample for sample in dataset.samples if sample.name in chosen]
    rest = [sample for sample in dataset.samples if sample.name not in chosen]
    return Split(
        EncodedDataset(tuple(rest)),
        EncodedDataset(tuple(held_out)),
        f"{count} of {len(names)} images {'is' if count == 1 else 'are'} held out of training to judge it by: "
        + _listed([name for name in names if name in chosen]),
    )


def _given(dataset: EncodedDataset, given: EncodedDataset) -> Split:
    ours, theirs = (len(one.samples[0].latents) for one in (dataset, given))
    if ours != theirs:
        raise DataError(
            f"validation images need latents of {ours} channels like the training images, got {theirs}; encode both "
            "with the same model"
        )
    trained = {_content(sample) for sample in dataset.samples}
    seen = list(dict.fromkeys(sample.name for sample in given.samples if _content(sample) in trained))
    count = len({sample.name for sample in given.samples})
    note = f"training is judged by {count} image{'s' if count > 1 else ''} given for it"
    if seen:
        note += (
            f", but {len(seen)} of them {'is' if len(seen) == 1 else 'are'} trained on too and cannot show "
            f"overfitting: {_listed(seen)}"
        )
    return Split(dataset, given, note)


def _place(name: str) -> bytes:
    """Where an image stands in the queue of those to be held out: anywhere, but always at the same place."""
    return hashlib.blake2b(f"held out/{name}".encode(), digest_size=8).digest()


def _content(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.latents.contiguous().numpy().tobytes(), digest_size=16).digest()


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
