"""What to look at in a folder of images before training on it: each finding with its pictures and a remedy.

The rules take facts about the pictures and read no file. They are silent about what is usual: captions of a subject that
begin alike, pictures that are reduced, a few pixels that a crop takes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasmith.data.captions import one_line
from lorasmith.data.folder import ImageFile
from lorasmith.data.picture_quality import PictureQuality

__all__ = ["CheckedImage", "Finding", "FindingKind", "LookAlikes", "TokenLimit", "found_in", "tags_of"]

FindingKind = Literal[
    "unused files",
    "empty pictures",
    "tiny pictures",
    "enlarged pictures",
    "blurred pictures",
    "cut pictures",
    "copies",
    "look-alikes",
    "missing captions",
    "empty captions",
    "equal captions",
    "long captions",
    "shared tags",
]

_ENLARGED, _TINY = 1.1, 2.0  # factors by which pictures are enlarged; less than a tenth is not seen
_KEPT = 0.8  # share of a picture that a crop should keep
_LISTED = 4  # names in a sentence
_FIX = "lorasmith data check --fix NEW_FOLDER"
_WORDS = 4  # of a caption from which equal ones are unlikely to be meant
_SHARED_FROM = 4


@dataclass(frozen=True)
class TokenLimit:
    """What a model's text encoder reads of a caption.

    Attributes:
        encoder: name of the model and its encoder, for sentences.
        longest: number of tokens that it was made for.
    """

    encoder: str
    longest: int


@dataclass(frozen=True)
class CheckedImage:
    """An image and what was found out about it.

    Attributes:
        file: the image.
        name: its path relative to the folder, with slashes.
        bucket: width and height at which it is trained.
        crop: the part of it that is trained: left, top, right and bottom in pixels of the upright picture.
        scale: factor by which that part is enlarged.
        quality: what was measured of its pixels.
        has_empty_caption: whether it has a caption file that is empty.
        tokens: of its caption, if a tokenizer was given.
    """

    file: ImageFile
    name: str
    bucket: tuple[int, int]
    crop: tuple[float, float, float, float]
    scale: float
    quality: PictureQuality
    has_empty_caption: bool = False
    tokens: int | None = None

    @property
    def kept(self) -> float:
        """Share of the picture's area that is trained."""
        left, top, right, bottom = self.crop
        return (right - left) * (bottom - top) / (self.file.width * self.file.height)

    @property
    def size(self) -> str:
        """Width and height of the picture in words."""
        return f"{self.file.width}×{self.file.height}"


@dataclass(frozen=True)
class LookAlikes:
    """Pictures of which one would do.

    Attributes:
        best: index of the one to keep: the largest, with a caption if there is one.
        others: indices of the others, ascending.
        copies: those of the others whose files have the same content as an earlier one.
    """

    best: int
    others: tuple[int, ...]
    copies: tuple[int, ...] = ()

    @property
    def members(self) -> tuple[int, ...]:
        """All of them, the one to keep first."""
        return (self.best, *self.others)


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        kind: what it is.
        problem: a sentence without its full stop.
        remedy: what to do, in the imperative.
        images: indices of the images concerned; empty if it concerns none alone.
    """

    kind: FindingKind
    problem: str
    remedy: str
    images: tuple[int, ...] = ()

    @property
    def sentence(self) -> str:
        """Problem and remedy."""
        return f"{self.problem}; {self.remedy}"


def found_in(
    images: Sequence[CheckedImage],
    *,
    skipped: Sequence[tuple[str, str]] = (),
    missing: Sequence[Path] = (),
    alike: Sequence[LookAlikes] = (),
    limit: TokenLimit | None = None,
    trigger: str = "",
    upscale: bool = True,
) -> tuple[Finding, ...]:
    """The findings about the images of a folder, the gravest kinds first.

    Args:
        images: all images.
        skipped: name and reason of each file that is not used.
        missing: images without a caption of their own.
        alike: groups of pictures of which one would do.
        limit: of captions, where their tokens were counted.
        trigger: phrase in front of captions that lack it.
        upscale: whether small pictures are enlarged.
    """
    return (
        *_unused(skipped),
        *_pixels(images, upscale=upscale),
        *_repeated(images, alike),
        *_captions(images, missing, trigger),
        *_equal_captions(images),
        *([] if limit is None else _long_captions(images, limit)),
        *_shared_tags(images, trigger),
    )


def tags_of(caption: str) -> list[str]:
    """The parts of a caption between commas, without empty ones."""
    return [tag for part in caption.split(",") if (tag := one_line(part))]


def _unused(skipped: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    if skipped:
        reasons = _joined([f"{name} {reason.partition(';')[0]}" for name, reason in skipped])
        yield Finding(
            "unused files",
            f"{_count(len(skipped), 'file or folder', 'files or folders')} cannot be used: {reasons}",
            f"mend, rename or remove them, or convert what can be with {_FIX}",
        )


def _pixels(images: Sequence[CheckedImage], *, upscale: bool) -> Iterator[Finding]:
    empty = [index for index, one in enumerate(images) if one.quality.is_empty]
    if empty:
        yield Finding(
            "empty pictures",
            f"{_show(empty, 'a single colour')}: {_listed(images, empty)}",
            "remove them unless that is the subject",
            tuple(empty),
        )
    tiny = [index for index, one in enumerate(images) if one.scale >= _TINY]
    large = [index for index, one in enumerate(images) if _ENLARGED <= one.scale < _TINY]
    for kind, size, found in (("tiny", "far ", tiny), ("enlarged", "", large)):
        if found:
            remedy = "use larger ones, a lower --resolution or --no-upscale" if upscale else "use larger ones"
            yield Finding(
                "tiny pictures" if kind == "tiny" else "enlarged pictures",
                f"{_are(found)} {size}smaller than {_buckets(images, found)} and would be enlarged: "
                + _listed(images, found, detail=lambda one: one.size),
                remedy,
                tuple(found),
            )
    blurred = [index for index, one in enumerate(images) if one.quality.is_blurred]
    if blurred:
        yield Finding(
            "blurred pictures",
            f"{_are(blurred)} blurred everywhere: {_listed(images, blurred)}",
            "use sharp ones, as the model learns the blur",
            tuple(blurred),
        )
    cut = [index for index, one in enumerate(images) if one.kept < _KEPT]
    if cut:
        yield Finding(
            "cut pictures",
            f"{_count(len(cut), 'image loses', 'images lose')} more than a fifth to the crop: "
            + _listed(images, cut, detail=lambda one: f"{one.size} → {one.bucket[0]}×{one.bucket[1]}"),
            "crop them yourself to what matters, or choose another --bucket-step or --resolution",
            tuple(cut),
        )


def _repeated(images: Sequence[CheckedImage], alike: Sequence[LookAlikes]) -> Iterator[Finding]:
    copies = {index: group.best for group in alike for index in group.copies}
    similar = {index: group.best for group in alike for index in group.others if index not in copies}
    remedy = f"keep one of each, or set them apart with {_FIX}"
    if copies:
        yield Finding(
            "copies",
            f"{_are(list(copies))} {'a copy' if len(copies) == 1 else 'copies'} of others: {_pairs(images, copies)}",
            remedy,
            tuple(copies),
        )
    if similar:
        yield Finding(
            "look-alikes",
            f"{_count(len(similar), 'image is', 'images are')} nearly identical to others: {_pairs(images, similar)}",
            f"{remedy}: what is drawn more often is learnt more",
            tuple(similar),
        )


def _captions(images: Sequence[CheckedImage], missing: Sequence[Path], trigger: str) -> Iterator[Finding]:
    paths = set(missing)
    # A trigger or the name of a folder is a caption.
    without = [i for i, one in enumerate(images) if one.file.path in paths and one.file.caption_source == "none"]
    empty = [i for i, one in enumerate(images) if one.file.path in paths and one.has_empty_caption]
    lacking = [index for index in without if index not in set(empty)]
    if lacking:
        which = "no image has a caption" if len(lacking) == len(images) else f"{_have(lacking)} no caption"
        names = "" if len(lacking) == len(images) else f": {_listed(images, lacking)}"
        yield Finding(
            "missing captions",
            f"{which}{names}",
            "write them into text files of the same name, or name the subject with --trigger",
            tuple(lacking),
        )
    if empty:
        instead = "the trigger alone describes them" if trigger.strip() else "nothing describes them"
        yield Finding(
            "empty captions",
            f"{_have(empty)} an empty caption file, so that {instead}: {_listed(images, empty)}",
            "write the captions or remove the files",
            tuple(empty),
        )


def _equal_captions(images: Sequence[CheckedImage]) -> Iterator[Finding]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(images):
        if one.file.caption_source == "file":
            groups[one.file.caption.casefold()].append(index)
    # One caption for all of them is a choice, and so are short ones.
    odd = [
        group for caption, group in groups.items() if 1 < len(group) < len(images) and len(caption.split()) >= _WORDS
    ]
    if odd:
        found = sorted(index for group in odd for index in group)
        example = images[odd[0][0]].file.caption
        yield Finding(
            "equal captions",
            f"{_count(len(found), 'image shares its caption', 'images share their captions')} with others: "
            f"{_listed(images, found)} ({_quoted(example)})",
            "say in each what only that picture shows",
            tuple(found),
        )


def _long_captions(images: Sequence[CheckedImage], limit: TokenLimit) -> Iterator[Finding]:
    found = [index for index, one in enumerate(images) if (one.tokens or 0) > limit.longest]
    if found:
        yield Finding(
            "long captions",
            f"{_count(len(found), 'caption has', 'captions have')} more than the {limit.longest} tokens that "
            f"{limit.encoder} was made for: {_listed(images, found, detail=lambda one: f'{one.tokens} tokens')}",
            "shorten them to what is seen in the picture",
            tuple(found),
        )


def _shared_tags(images: Sequence[CheckedImage], trigger: str) -> Iterator[Finding]:
    written = [tags_of(one.file.caption) for one in images if one.file.caption_source == "file"]
    if len(written) < _SHARED_FROM or len(written) < len(images):
        return
    counts = Counter(tag for tags in written for tag in {tag.casefold() for tag in tags})
    first = {tags[0].casefold() for tags in written if tags}
    # A first tag that all share is what the LoRA is called by.
    named = first | {one_line(trigger).casefold()} if len(first) == 1 else {one_line(trigger).casefold()}
    names: Mapping[str, str] = {tag.casefold(): tag for tags in reversed(written) for tag in tags}
    shared = [names[tag] for tag, count in counts.items() if count == len(written) and tag not in named]
    if shared:
        shared.sort(key=lambda tag: [one.casefold() for one in written[0]].index(tag.casefold()))
        yield Finding(
            "shared tags",
            f"every caption has the {'tag' if len(shared) == 1 else 'tags'} "
            f"{_joined([_quoted(tag) for tag in shared])}, which prompts will need too",
            "remove what need not be written each time, keeping the word for your subject",
        )


def _buckets(images: Sequence[CheckedImage], found: Sequence[int]) -> str:
    """The size that pictures are trained at, or the most frequent one of several."""
    sizes = Counter(images[index].bucket for index in found)
    (width, height), _ = sizes.most_common(1)[0]
    return f"{width}×{height}" if len(sizes) == 1 else "their size in training"


def _listed(
    images: Sequence[CheckedImage], found: Sequence[int], *, detail: Callable[[CheckedImage], str] | None = None
) -> str:
    """The names of some images, with a detail of each."""
    shown = [images[index] for index in found[: _LISTED + 1]]
    return _joined([f"{one.name} ({detail(one)})" if detail else one.name for one in shown], of=len(found))


def _pairs(images: Sequence[CheckedImage], originals: Mapping[int, int]) -> str:
    return _joined([f"{images[one].name} (of {images[best].name})" for one, best in originals.items()])


def _joined(texts: Sequence[str], *, of: int | None = None) -> str:
    """Some of the texts, separated by commas, and the number of the others."""
    total = len(texts) if of is None else of
    shown = _LISTED if total > _LISTED + 1 else total  # "and 1 more" is longer than most names
    more = total - shown
    return ", ".join(texts[:shown]) + (f" and {more:,} more" if more else "")


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _are(found: Sequence[int]) -> str:
    return _count(len(found), "image is", "images are")


def _have(found: Sequence[int]) -> str:
    return _count(len(found), "image has", "images have")


def _show(found: Sequence[int], what: str) -> str:
    return f"{_count(len(found), 'image shows', 'images show')} {what}"


def _quoted(text: str) -> str:
    return f"'{text}'" if len(text) <= 60 else f"'{text[:57].rstrip()}…'"
