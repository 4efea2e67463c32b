"""A folder of images checked before training on it: facts about each image, and findings.

Images are read once, reduced, by several threads, whose number does not change the result. About a hundred bytes are
kept per image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.data.captions import CaptionRules, json_fault, read_caption
from lorasmith.data.clips import open_still
from lorasmith.data.crops import Framing, framings_of, pixel_step
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import held_out_names
from lorasmith.data.findings import (
    CaptionKeys,
    CheckedImage,
    Finding,
    FindingKind,
    LookAlikes,
    PairRules,
    TokenLimit,
    found_in,
)
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.folder_listing import Reason
from lorasmith.data.image_files import in_threads
from lorasmith.data.picture_quality import MEASURED_EDGE, PictureQuality, look_alikes, measured
from lorasmith.data.source_files import Candidate
from lorasmith.families.forms import ControlForm

_USUAL = (1024, 768, 512, 256)
_FILLED = 0.75  # share of the images that a resolution must not enlarge
_MOST_THREADS = 8


@dataclass(frozen=True)
class Bucket:
    """A training size in pixels, and its numbers of images and of samples (repeats included)."""

    width: int
    height: int
    images: int
    samples: int


@dataclass(frozen=True)
class Epoch:
    """The samples of an epoch, repeats included."""

    samples: int  # without held-out ones
    held_out: tuple[str, ...]  # names of images held out for validation
    held_out_samples: int  # their number, repeats included
    batch: int  # samples per step

    def steps(self, epochs: float) -> int:
        """Rounded up."""
        return -int(-epochs * self.samples // self.batch)

    def epochs(self, steps: int) -> float:
        return steps * self.batch / self.samples


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A checked folder."""

    folder: Path
    resolutions: tuple[int, ...]  # in pixels; the first one decides sizes here
    multiple: int  # of which sides are multiples
    trigger: str  # prepended to captions that lack it
    images: tuple[CheckedImage, ...]  # in the order of the scan
    skipped: tuple[tuple[Path, Reason], ...]  # files and folders with reason and remedy
    notes: tuple[str, ...]  # other remarks of the scan
    buckets: tuple[Bucket, ...]  # at the first resolution, the most frequent first
    alike: tuple[LookAlikes, ...]
    epoch: Epoch
    limit: TokenLimit | None  # None where tokens were not counted, or are read however many there are
    findings: tuple[Finding, ...]  # the most serious kinds first
    refused: tuple[Candidate, ...] = ()  # the image files among `skipped`

    @property
    def captioned(self) -> int:
        return sum(image.is_captioned for image in self.images)

    @property
    def paired(self) -> int:
        """Number of images with controls."""
        return sum(bool(image.file.controls) for image in self.images)

    def findings_of(self, index: int) -> list[FindingKind]:
        return [finding.kind for finding in self.findings if index in finding.images]


def preflight(
    scan: FolderScan,
    config: DataConfig,
    *,
    folder: Path,
    resolution: int,
    multiple: int,
    tokenize: Callable[[str], int] | None = None,
    limit: TokenLimit | None = None,
    keys: CaptionKeys | None = None,
    form: ControlForm | None = None,
    batch: int = 1,
    validation_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """Check a scanned folder.

    `resolution` is the model's, for a `config` without one; sides are multiples of at least `multiple`. `tokenize`
    counts a caption's tokens, `keys` are those of captions in JSON. `form` is that of the model's controls.
    `validation_share` is held out as by `split`. `progress` receives (images done, all images). ImageError if an image
    can no longer be read; DataError if the resolution is below `multiple`.
    """
    resolutions = config.all_resolutions(resolution)
    step = pixel_step(config, multiple)
    plain = replace(config, flip=False, picture_variants=1)
    frames = [framings_of(image, plain, resolution=resolution, multiple=step) for image in scan.images]
    qualities = []
    for quality in in_threads(_measured, list(zip(scan.images, frames, strict=True)), most=_MOST_THREADS):
        qualities.append(quality)
        if progress:
            progress(len(qualities), len(scan.images))
    count = partial(_tokens, tokenize, config) if tokenize else None
    fault = partial(_json_fault, keys, config) if keys else None
    images = tuple(
        _checked(image, quality, folder, framings_of, count, fault)
        for image, quality, framings_of in zip(scan.images, qualities, frames, strict=True)
    )
    alike = tuple(_compared(images, qualities))
    return Preflight(
        folder=folder,
        resolutions=resolutions,
        multiple=step,
        trigger=config.trigger,
        images=images,
        skipped=scan.skipped,
        notes=scan.notes,
        buckets=_buckets(images),
        alike=alike,
        epoch=epoch_of(scan.images, batch, validation_share),
        limit=limit,
        findings=found_in(
            images,
            skipped=[(name_in(folder, path), reason) for path, reason in scan.skipped],
            missing=scan.missing_captions,
            alike=alike,
            limit=limit,
            keys=keys,
            trigger=config.trigger,
            caption_dropout=config.caption_dropout,
            upscale=config.upscale,
            controls=_pair_rules(scan, config, form),
        ),
        refused=scan.refused,
    )


def _pair_rules(scan: FolderScan, config: DataConfig, form: ControlForm | None) -> PairRules | None:
    """None where images have no controls and need none."""
    has_some = any(image.controls for image in scan.images) or bool(config.control)
    are_opposites = config.controls == "opposite"
    is_required = form is not None and form.is_required and form.are_files and config.controls == "required"
    if not has_some and not is_required and not are_opposites:
        return None
    are_aligned = are_opposites or form is None or form.is_aligned
    return PairRules(are_opposites or config.controls == "required", are_aligned, are_opposites)


def epoch_of(images: Sequence[ImageFile], batch: int, validation_share: float | None) -> Epoch:
    """The samples of an epoch; images of the subject's class are not counted."""
    subjects = [image for image in images if not image.is_class]
    names = list(dict.fromkeys(image.name for image in subjects))
    chosen = held_out_names(names, validation_share)
    held_out = sum(image.repeats for image in subjects if image.name in chosen)
    total = sum(image.repeats for image in subjects)
    return Epoch(total - held_out, tuple(name for name in names if name in chosen), held_out, batch)


def name_in(folder: Path, path: Path) -> str:
    """A file's path relative to the folder, with slashes; its name if it is elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def usual_resolution(images: Sequence[ImageFile]) -> int:
    """The largest usual resolution that most of the images fill, for use without a model."""
    areas = [image.width * image.height for image in images]
    fitting = (side for side in _USUAL if sum(area >= side**2 for area in areas) >= _FILLED * len(areas))
    return next(fitting, _USUAL[-1])


def _measured(pair: tuple[ImageFile, Sequence[Framing]]) -> PictureQuality:
    """The quality of an image, measured at its largest training size."""
    image, frames = pair
    longest = max(max(frame.width, frame.height) for frame in frames)
    return measured(open_still(image.path, min(MEASURED_EDGE, longest), grey=True))


def _checked(
    image: ImageFile,
    quality: PictureQuality,
    folder: Path,
    frames: Sequence[Framing],
    count: Callable[[ImageFile], int] | None,
    fault: Callable[[ImageFile], str] | None,
) -> CheckedImage:
    largest = max(frames, key=lambda frame: frame.scale)  # decides whether the picture is large enough
    return CheckedImage(
        image,
        name_in(folder, image.path),
        (frames[0].width, frames[0].height),
        frames[0].box,
        largest.scale,
        (largest.width, largest.height),
        quality,
        has_empty_caption=not image.captions and _has_caption_file(image.path),
        tokens=count(image) if count else None,
        json_fault=fault(image) if fault else "",
    )


def _tokens(tokenize: Callable[[str], int], config: DataConfig, image: ImageFile) -> int:
    """Tokens of an image's longest caption, prefix, trigger and suffix included."""
    rules = CaptionRules.of(config, is_class=image.is_class)
    return max(tokenize(rules.plain([caption])) for caption in image.captions or ("",))


def _json_fault(keys: CaptionKeys, config: DataConfig, image: ImageFile) -> str:
    """The first fault of an image's captions in JSON, as they are trained."""
    rules = CaptionRules.of(config, is_class=image.is_class)
    faults = (json_fault(rules.plain([caption]), keys.keys) for caption in image.captions)
    return next(filter(None, faults), "")


def _has_caption_file(image: Path) -> bool:
    """Whether there is an empty caption file."""
    try:
        caption = read_caption(image)
    except DataError:  # unused caption files may hold anything
        return False
    return caption is not None and not caption.text


def _compared(images: Sequence[CheckedImage], qualities: Sequence[PictureQuality]) -> Iterable[LookAlikes]:
    for group in _with_equal_controls(images, look_alikes(qualities)):
        best = max(group, key=lambda index: (*images[index].worth, -index))
        others = tuple(index for index in group if index != best)
        originals: dict[str, int] = {}
        copies = []
        for index in (best, *others):
            original = originals.setdefault(images[index].file.digest, index)
            copies += [(index, original)] if original != index else []
        yield LookAlikes(best, others, tuple(copies))


def _with_equal_controls(images: Sequence[CheckedImage], groups: Iterable[Sequence[int]]) -> Iterator[list[int]]:
    """The parts of these groups whose images have the same controls: edits of others may look alike."""
    for group in groups:
        parts = defaultdict[tuple[str, ...], list[int]](list)
        for index in group:
            parts[tuple(control.digest for control in images[index].file.controls)].append(index)
        yield from (part for part in parts.values() if len(part) > 1)


def _buckets(images: Sequence[CheckedImage]) -> tuple[Bucket, ...]:
    counts, samples = Counter(image.bucket for image in images), Counter[tuple[int, int]]()
    for image in images:
        samples[image.bucket] += image.file.repeats
    ordered = sorted(counts, key=lambda size: (-counts[size], size))
    return tuple(Bucket(*size, counts[size], samples[size]) for size in ordered)
