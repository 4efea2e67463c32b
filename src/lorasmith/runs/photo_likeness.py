"""Findings about photos by what they show, where the extra `likeness` is there: odd ones out, and near copies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.cancellation import check_wanted
from lorasmith.core.printable import count_text
from lorasmith.data.captions import COMMON_WORDS
from lorasmith.data.clips import open_still
from lorasmith.data.findings import CheckedImage, Finding, listed
from lorasmith.data.preflight import Preflight
from lorasmith.evaluation import likeness
from lorasmith.evaluation.photo_groups import nearly_same, odd_ones_out

MOST_PHOTOS = 200
"""Photos up to which they are compared: each takes about 30 ms of a core, once."""


def with_likeness(preflight: Preflight) -> Preflight:
    """A checked folder with these findings; without the extra, or of more than `MOST_PHOTOS`, as it is."""
    subjects = [index for index, image in enumerate(preflight.images) if not image.file.is_class]
    if not likeness.is_installed() or not 1 < len(subjects) <= MOST_PHOTOS:
        return preflight
    features = torch.stack([_features(preflight.images[index].file.path) for index in subjects])
    more = (*_nearly_same(preflight, subjects, features), *_odd_ones(preflight.images, subjects, features))
    return replace(preflight, findings=(*preflight.findings, *more))


def _nearly_same(preflight: Preflight, subjects: Sequence[int], features: Tensor) -> Iterator[Finding]:
    indexes = {index for group in preflight.alike for index in group.others}
    groups = [set(group.members) for group in preflight.alike]  # named already, whichever of them is to be kept
    pairs = {subjects[second]: subjects[first] for first, second in nearly_same(features)}
    same = {
        index: first
        for index, first in pairs.items()
        if index not in indexes and not any({index, first} <= group for group in groups)
    }
    if same:
        place = {id(image): index for index, image in enumerate(preflight.images)}
        yield Finding(
            "much alike",
            f"{count_text(len(same), 'image')} {'is' if len(same) == 1 else 'are'} much like "
            f"{'another' if len(same) == 1 else 'others'}, mirrored or of the same moment",
            listed(
                preflight.images, tuple(same), lambda image: f"like {preflight.images[same[place[id(image)]]].name}"
            ),
            "keep one of each, unless what differs is to be learnt",
            tuple(same),
        )


def _odd_ones(images: Sequence[CheckedImage], subjects: Sequence[int], features: Tensor) -> Iterator[Finding]:
    odd = [subjects[index] for index in odd_ones_out(features)]
    if odd:
        main = [images[index] for index in subjects if index not in odd]
        words = _shared_words([image.file.caption for image in main], [images[index].file.caption for index in odd])
        shown = f" ({words})" if words else ""
        is_one = len(odd) == 1
        yield Finding(
            "odd ones out",
            f"{len(main):,} images show much the same{shown}, and {count_text(len(odd), 'other')} "
            f"{'shows' if is_one else 'show'} something else",
            listed(images, odd),
            f"leave {'it' if is_one else 'them'} out, unless the LoRA is to learn {'it' if is_one else 'them'} too",
            tuple(odd),
        )


def _shared_words(captions: Sequence[str], others: Sequence[str]) -> str:
    """The words that all captions have and none of the others; empty if there are none."""
    spoken = [re.findall(r"\w+", caption.casefold()) for caption in captions]
    shared = set(spoken[0]).intersection(*spoken) - COMMON_WORDS
    shared -= {word for other in others for word in re.findall(r"\w+", other.casefold())}
    return " ".join(word for word in dict.fromkeys(spoken[0]) if word in shared)


def _features(path: Path) -> Tensor:
    check_wanted()
    status = path.stat()
    return _features_of(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _features_of(path: str, modified: int, size: int) -> Tensor:
    """Features of a file in this state, (1280,)."""
    return likeness.features([open_still(Path(path), 2 * likeness.EDGE)])[0]
