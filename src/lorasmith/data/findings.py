"""What to check in a folder of images before training on it: each finding with its pictures and a remedy.

The rules take facts about the pictures and read no files. They ignore what is usual: captions of a subject that begin
alike, pictures that are reduced, a few pixels that a crop removes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Literal

from lorasmith.core.errors import DataError
from lorasmith.data.captions import has_trigger, one_line, read_caption
from lorasmith.data.controls import has_aspect_of
from lorasmith.data.folder import ImageFile
from lorasmith.data.folder_listing import Reason, ReasonKind, reader_install
from lorasmith.data.picture_quality import PictureQuality
from lorasmith.data.shared_phrases import shared_phrases
from lorasmith.families.parts.clip import word_rank

FindingKind = Literal[
    "unused files",
    "empty pictures",
    "tiny pictures",
    "enlarged pictures",
    "blurred pictures",
    "cut pictures",
    "copies",
    "look-alikes",
    "much alike",
    "odd ones out",
    "missing controls",
    "unchanged pairs",
    "swapped pairs",
    "other aspects",
    "missing captions",
    "empty captions",
    "equal captions",
    "long captions",
    "broken captions",
    "known trigger",
    "dropped captions",
    "shared tags",
]

_ENLARGED, _TINY = 1.1, 2.0  # factors by which pictures are enlarged; less than a tenth is not seen
_KEPT = 0.8  # share of a picture that a crop should keep
_LISTED = 4  # names in a sentence
_FIX = "lorasmith data check --fix"
_WORDS = 4  # of a caption from which equal ones are unlikely to be meant
_SHARED_FROM = 4
_RARE = 25_000  # rank in CLIP's vocabulary from which a word is rare enough to be learnt: sneaker is 24,781, tok 27,010
_NAMED_BY = 2  # words of a trigger; more of them name something in particular
_USUAL_DROPOUT = 0.1


@dataclass(frozen=True)
class TokenLimit:
    """Longest caption in tokens that a model, or its text encoder, reads well."""

    reader: str  # in messages
    longest: int
    cuts: bool = False  # the rest is not read

    @property
    def rule(self) -> str:
        return f"that {self.reader} {'reads' if self.cuts else 'was made for'}"


@dataclass(frozen=True)
class CaptionKeys:
    """The keys of captions in JSON on which a model was trained."""

    reader: str  # in messages
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PairRules:
    """What is expected of the controls of images."""

    are_needed: bool  # by each image
    are_aligned: bool  # with the picture that is made of them
    are_opposites: bool = False


@dataclass(frozen=True)
class CheckedImage:
    """An image and what was measured of it."""

    file: ImageFile
    name: str  # path relative to the folder, with slashes
    bucket: tuple[int, int]  # width, height at which it is trained
    crop: tuple[float, float, float, float]  # trained part, in pixels of the upright picture: left, top, right, bottom
    scale: float  # enlargement of that part at its largest size
    largest: tuple[int, int]  # that size: width, height
    quality: PictureQuality
    has_empty_caption: bool = False  # its caption file is empty
    tokens: int | None = None  # of its caption, if a tokenizer was passed
    json_fault: str = ""  # of its caption, if it is meant as JSON and keys were passed

    @property
    def kept(self) -> float:
        """Share of the picture's area that is trained."""
        left, top, right, bottom = self.crop
        return (right - left) * (bottom - top) / (self.file.width * self.file.height)

    @property
    def is_captioned(self) -> bool:
        """Whether it has a caption of its own."""
        return self.file.caption_source in ("file", "metadata")

    @property
    def worth(self) -> tuple[bool, int, bool, bool, int]:
        """Rank among look-alikes: sharp, large, masked, captioned, little compressed."""
        file = self.file
        # A mask is kept whether or not this training uses it.
        is_masked = file.mask is not None or any(file.path.parent.glob(f"{escape(file.path.stem)}.mask.*"))
        area, size_bytes = file.width * file.height, file.path.stat().st_size
        return not self.quality.is_blurred, area, is_masked, self.is_captioned, size_bytes

    @property
    def size(self) -> str:
        return _size((self.file.width, self.file.height))

    @property
    def enlargement(self) -> str:
        return f"{self.size} to {_size(self.largest)}"


@dataclass(frozen=True)
class LookAlikes:
    """Near-duplicates, as indices of images."""

    best: int  # the one to keep: sharp, large, masked, captioned
    others: tuple[int, ...]  # ascending
    copies: tuple[tuple[int, int], ...] = ()  # each of `others` with the content of another member, and that member

    @property
    def members(self) -> tuple[int, ...]:
        """All of them, the one to keep first."""
        return (self.best, *self.others)


@dataclass(frozen=True)
class Finding:
    """A possible problem of a data set."""

    kind: FindingKind
    problem: str  # a sentence without its full stop
    examples: str  # names of the first images or files concerned, with details
    remedy: str  # in the imperative
    images: tuple[int, ...] = ()  # indices; empty if no single image is concerned

    @property
    def sentence(self) -> str:
        return f"{self.problem}{': ' if self.examples else ''}{self.examples}; {self.remedy}"


def found_in(
    images: Sequence[CheckedImage],
    *,
    skipped: Sequence[tuple[str, Reason]] = (),
    missing: Sequence[Path] = (),
    alike: Sequence[LookAlikes] = (),
    limit: TokenLimit | None = None,
    keys: CaptionKeys | None = None,
    trigger: str = "",
    caption_dropout: float = 0.0,
    upscale: bool = True,
    controls: PairRules | None = None,
) -> tuple[Finding, ...]:
    """The findings about the images of a folder, the most serious kinds first.

    `skipped` has names and reasons, `missing` the images without a caption of their own; `limit` is given where tokens
    were counted and the model has one, `keys` where captions may be JSON, `controls` where images are checked as
    pairs.
    """
    return (
        *_unused(skipped),
        *_pixels(images, upscale=upscale),
        *_repeated(images, alike),
        *([] if controls is None else _pairs(images, controls)),
        *_captions(images, missing, trigger),
        *_equal_captions(images, {index for group in alike for index in group.others}),
        *([] if limit is None else _long_captions(images, limit)),
        *([] if keys is None else _broken_captions(images, keys)),
        *_known_trigger(one_line(trigger)),
        *_dropped_captions(trigger, caption_dropout),
        *_shared_tags(images, one_line(trigger)),
    )


def tags_of(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without empty ones."""
    return [tag for part in caption.split(",") if (tag := one_line(part))]


def listed(
    images: Sequence[CheckedImage], found: Collection[int], detail: Callable[[CheckedImage], str] | None = None
) -> str:
    """The names of some images, with a detail of each."""
    shown = [images[index] for index in islice(found, _LISTED + 1)]
    return joined([f"{image.name} ({detail(image)})" if detail else image.name for image in shown], of=len(found))


_UNUSED: dict[ReasonKind, str] = {
    "unreadable": "damaged or no picture",
    "format": "in a format that is not read",
    "video": "a video",
    "size": "too small or too long",
    "caption": "with an unusable caption",
    "mask": "with an unusable mask",
    "metadata": "for a metadata file",
    "folder": "folders",
    "link": "links out of the folder",
}
"""Why files and folders are not used, a clause after their number."""


def _unused(skipped: Sequence[tuple[str, Reason]]) -> Iterator[Finding]:
    if skipped:
        counts = Counter(reason.kind for _, reason in skipped)
        kinds = ", ".join(f"{counts[kind]:,} {what}" for kind, what in _UNUSED.items() if counts[kind])
        suffixes = dict.fromkeys(Path(name).suffix.lower() for name, _ in skipped)
        commands = {command: suffix[1:].upper() for suffix in suffixes if (command := reader_install(suffix))}
        readers = "".join(f"; {command} reads {kind}" for command, kind in commands.items())
        yield Finding(
            "unused files",
            f"{_count(skipped, 'file or folder', 'files or folders')} cannot be used"
            + (f" ({kinds})" if len(counts) > 1 else ""),
            joined([f"{name} ({reason.partition(';')[0]})" for name, reason in skipped]),
            f"mend, rename or remove {_them(skipped)}"
            + (f", or convert what can be converted with {_FIX}" if counts["format"] else "")
            + readers,
        )


def _pixels(images: Sequence[CheckedImage], *, upscale: bool) -> Iterator[Finding]:
    if empty := _those(images, lambda image: image.quality.is_empty):
        problem = f"{_count(empty, 'image shows', 'images show')} a single colour"
        yield _about(images, empty, "empty pictures", problem, f"remove {_them(empty)} unless that is the subject")
    kinds: tuple[tuple[FindingKind, str, tuple[int, ...]], ...] = (
        ("tiny pictures", "far ", _those(images, lambda image: image.scale >= _TINY)),
        ("enlarged pictures", "", _those(images, lambda image: _ENLARGED <= image.scale < _TINY)),
    )
    for kind, much, found in kinds:
        if found:
            sizes = {images[index].largest for index in found}
            size = _size(*sizes) if len(sizes) == 1 else "their size in training"
            larger = f"use {'a larger one' if len(found) == 1 else 'larger ones'}"
            yield _about(
                images,
                found,
                kind,
                f"{_are(found)} {much}smaller than {size} and would be enlarged",
                f"{larger}, a lower --resolution or --no-upscale" if upscale else larger,
                attrgetter("size" if len(sizes) == 1 else "enlargement"),
            )
    if blurred := _those(images, lambda image: image.quality.is_blurred):
        remedy = f"use {'a sharp one' if len(blurred) == 1 else 'sharp ones'}, as the model learns the blur"
        yield _about(images, blurred, "blurred pictures", f"{_are(blurred)} blurred everywhere", remedy)
    if cut := _those(images, lambda image: image.kept < _KEPT):
        yield _about(
            images,
            cut,
            "cut pictures",
            f"{_count(cut, 'image loses', 'images lose')} more than a fifth to the crop",
            f"crop {_them(cut)} yourself to what matters, or choose another --bucket-step or --resolution",
            lambda image: f"{image.size} to {_size(image.bucket)}",
        )


def _repeated(images: Sequence[CheckedImage], alike: Sequence[LookAlikes]) -> Iterator[Finding]:
    place = {image.name: index for index, image in enumerate(images)}
    copies = dict(sorted(pair for group in alike for pair in group.copies))
    similar = dict(sorted((index, group.best) for group in alike for index in group.others if index not in copies))
    if copies:
        yield _about(
            images,
            copies,
            "copies",
            _count(copies, "image is a copy of another", "images are copies of others"),
            f"keep one of each, or set the others apart with {_FIX}",
            lambda image: f"of {images[copies[place[image.name]]].name}",
        )
    if similar:
        yield _about(
            images,
            similar,
            "look-alikes",
            _count(similar, "image nearly equals another", "images nearly equal others"),
            f"keep one of each, as a picture that is there twice is learnt twice, or set the others apart with {_FIX}",
            lambda image: f"like {images[similar[place[image.name]]].name}",
        )


def _pairs(images: Sequence[CheckedImage], rules: PairRules) -> Iterator[Finding]:
    if rules.are_needed and (
        lacking := _those(images, lambda image: not image.file.controls and not image.file.is_class)
    ):
        otherwise = "leave --pairs out" if rules.are_opposites else "train with --controls optional"
        remedy = f"add a file of the same name to the folder of controls, or {otherwise}"
        yield _about(images, lacking, "missing controls", f"{_have(lacking)} no control", remedy)
    if equal := _those(images, lambda image: image.file.digest in {control.digest for control in image.file.controls}):
        problem = (
            f"{_count(equal, 'image is', 'images are')} the same as {'its' if len(equal) == 1 else 'their'} control"
        )
        remedy = f"replace {_them(equal)}, as the model learns to change nothing"
        yield _about(images, equal, "unchanged pairs", problem, remedy)
    if swapped := _those(
        images, lambda image: not image.is_captioned and any(_has_caption(c) for c in image.file.controls)
    ):
        problem = (
            f"{_have(swapped)} no caption, but {'its control has' if len(swapped) == 1 else 'their controls have'}"
        )
        remedy = "check that the edited pictures are trained on and --control names those before, or move the captions"
        yield _about(images, swapped, "swapped pairs", problem, remedy)
    if other := _those(
        images, lambda image: rules.are_aligned and not all(has_aspect_of(c, image.file) for c in image.file.controls)
    ):
        yield _about(
            images,
            other,
            "other aspects",
            f"{_have(other)} a control of another aspect ratio, which is cropped on its own",
            f"crop {_them(other)} and the control alike, unless the edit changes the frame",
            lambda image: f"{image.size} from {', '.join(_size((c.width, c.height)) for c in image.file.controls)}",
        )


def _has_caption(control: ImageFile) -> bool:
    try:
        caption = read_caption(control.path)
    except DataError:  # unused caption files may hold anything
        return False
    return caption is not None and bool(caption.text)


def _captions(images: Sequence[CheckedImage], missing: Sequence[Path], trigger: str) -> Iterator[Finding]:
    paths = set(missing)
    # A trigger or a folder name counts as a caption.
    lacking = _those(
        images,
        lambda image: image.file.path in paths and image.file.caption_source == "none" and not image.has_empty_caption,
    )
    if lacking:
        is_all = len(lacking) == len(images)
        yield Finding(
            "missing captions",
            "no image has a caption, and there is no trigger" if is_all else f"{_have(lacking)} no caption",
            "" if is_all else listed(images, lacking),
            "write captions into text files of the same name, or name the subject with --trigger",
            lacking,
        )
    if empty := _those(images, lambda image: image.file.path in paths and image.has_empty_caption):
        instead = "the trigger alone describes" if trigger.strip() else "nothing describes"
        yield _about(
            images,
            empty,
            "empty captions",
            f"{_have(empty)} an empty caption file, so that {instead} {_them(empty)}",
            "write the caption or remove the file" if len(empty) == 1 else "write the captions or remove the files",
        )


def _equal_captions(images: Sequence[CheckedImage], repeated: Container[int]) -> Iterator[Finding]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index in _those(images, lambda image: image.is_captioned and not image.file.is_class):
        if index not in repeated:
            groups[images[index].file.caption.casefold()].append(index)
    # One caption for all of them is a choice, and so are short ones.
    odd = [
        group
        for caption, group in groups.items()
        if len(group) > 1 and len(groups) > 1 and len(caption.split()) >= _WORDS
    ]
    if odd:
        indexes = tuple(sorted(index for group in odd for index in group))
        yield Finding(
            "equal captions",
            f"{len(indexes):,} images share their captions with others",
            f"{listed(images, indexes)} ({_quoted(images[odd[0][0]].file.caption)})",
            "say in each what only that picture shows",
            indexes,
        )


def _long_captions(images: Sequence[CheckedImage], limit: TokenLimit) -> Iterator[Finding]:
    if found := _those(images, lambda image: (image.tokens or 0) > limit.longest):
        problem = f"{_count(found, 'caption has', 'captions have')} more than the {limit.longest} tokens {limit.rule}"
        remedy = f"shorten {_them(found)} to what is seen in the picture"
        yield _about(images, found, "long captions", problem, remedy, lambda image: f"{image.tokens:,} tokens")


def _broken_captions(images: Sequence[CheckedImage], keys: CaptionKeys) -> Iterator[Finding]:
    if found := _those(images, lambda image: bool(image.json_fault)):
        named = " and ".join(keys.keys)
        problem = f"{_count(found, 'caption is', 'captions are')} no JSON object with {named}, as {keys.reader} reads"
        remedy = f"mend {_them(found)}, with nothing in front"
        yield _about(images, found, "broken captions", problem, remedy, lambda image: image.json_fault)


def _known_trigger(trigger: str) -> Iterator[Finding]:
    words = trigger.split()
    if 0 < len(words) <= _NAMED_BY and all((word_rank(word) or _RARE) < _RARE for word in words):
        yield Finding(
            "known trigger",
            f"the model knows the trigger {_quoted(trigger)} already, so that the LoRA changes all pictures of it",
            "",
            f"put a rare word in front of it, in captions too, such as 'ohwx {trigger}'",
        )


def _dropped_captions(trigger: str, dropout: float) -> Iterator[Finding]:
    if dropout > _USUAL_DROPOUT:
        left_out = "the trigger" if trigger else "prefix and suffix"
        yield Finding(
            "dropped captions",
            f"{dropout:.0%} of the pictures are trained with an empty text, which has not even {left_out}, so that the "
            "LoRA acts on every prompt",
            "",
            f"lower --caption-dropout to {_USUAL_DROPOUT:g} or less",
        )


def _shared_tags(images: Sequence[CheckedImage], trigger: str) -> Iterator[Finding]:
    subjects = [image for image in images if not image.file.is_class]
    written = [one_line(subject.file.caption) for subject in subjects if subject.is_captioned]
    if len(written) < max(_SHARED_FROM, len(subjects)):
        return
    if found := shared_phrases(written, trigger):
        nearly = "" if all(has_trigger(caption, phrase) for phrase in found for caption in written) else "nearly "
        what = ("tag" if set(found) <= set(tags_of(written[0])) else "phrase") + ("" if len(found) == 1 else "s")
        yield Finding(
            "shared tags",
            f"{nearly}every caption has the {what} {joined([_quoted(phrase) for phrase in found])}",
            "",
            "leave out what the subject always has, which its trigger then learns, or write it into every prompt",
        )


def _about(
    images: Sequence[CheckedImage],
    found: Collection[int],
    kind: FindingKind,
    problem: str,
    remedy: str,
    detail: Callable[[CheckedImage], str] | None = None,
) -> Finding:
    """A finding about some of the images, with a detail of each of the first ones."""
    return Finding(kind, problem, listed(images, found, detail), remedy, tuple(found))


def _those(images: Sequence[CheckedImage], are: Callable[[CheckedImage], bool]) -> tuple[int, ...]:
    return tuple(index for index, image in enumerate(images) if are(image))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def joined(texts: Sequence[str], *, of: int | None = None) -> str:
    """The first texts, comma-separated, and the number of the others."""
    total = len(texts) if of is None else of
    shown = _LISTED if total > _LISTED + 1 else total  # "and 1 more" is as long as a name
    more = total - shown
    return ", ".join(texts[:shown]) + (f" and {more:,} more" if more else "")


def _count(found: Collection[object], singular: str, many: str) -> str:
    return f"{len(found):,} {singular if len(found) == 1 else many}"


def _are(found: Collection[int]) -> str:
    return _count(found, "image is", "images are")


def _have(found: Collection[int]) -> str:
    return _count(found, "image has", "images have")


def _them(found: Collection[object]) -> str:
    return "it" if len(found) == 1 else "them"


def _quoted(text: str) -> str:
    return f"'{text}'" if len(text) <= 60 else f"'{text[:57].rstrip()}…'"
