"""Selection of held-out images for validation.

Images are identified by name: repeats, mirrored copies, and files of one name in several subfolders are held out
together. The selection depends on the names, not on the run's seed, so that two runs on the same folder have the same
held-out images; adding or removing an image changes at most one or two others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text
from lorasmith.data.dataset import EncodedDataset, Sample

AUTOMATIC_FROM = 12
"""Number of distinct images from which a tenth is held out by default; with fewer, each matters more in training."""

_AUTOMATIC_SHARE = 0.1
_NAMED = 8  # maximum number of names in a sentence


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
    return frozenset(sorted(names, key=_place)[: min(count, len(names) - 1)])


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
    note = f"validation uses {count_text(count, 'separate image')}"
    if seen:
        note += (
            f", but {len(seen)} of them {'is' if len(seen) == 1 else 'are'} trained on too and cannot show "
            f"overfitting: {_listed(seen)}"
        )
    return Split(dataset, given, note, is_note_grave=bool(seen))


def _place(name: str) -> bytes:
    """Pseudorandom sort key of an image, a function of its name."""
    return hashlib.blake2b(f"held out/{name}".encode(), digest_size=8).digest()


def _content(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.latents.contiguous().numpy().tobytes(), digest_size=16).digest()


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
