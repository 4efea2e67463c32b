"""A folder of images checked before training on it: facts about each image, and what to look at.

Images are read once, reduced, by several threads; the result does not depend on how many. What is kept of an image are
some hundred bytes.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.data.caption_rules import CaptionRules
from lorasmith.data.captions import read_caption
from lorasmith.data.clips import open_still
from lorasmith.data.crops import Framing, centre_of, framings, pixel_step
from lorasmith.data.data_config import DataConfig
from lorasmith.data.findings import CheckedImage, Finding, FindingKind, LookAlikes, TokenLimit, found_in
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.folder_listing import Reason
from lorasmith.data.framed_pictures import mask_of
from lorasmith.data.picture_quality import MEASURED_EDGE, PictureQuality, look_alikes, measured
from lorasmith.data.source_files import Candidate
from lorasmith.data.split import held_out_names

_USUAL = (1024, 768, 512, 256)
_FILLED = 0.75  # share of the images that a resolution must not enlarge
_MOST_THREADS, _AHEAD = 8, 256


@dataclass(frozen=True)
class Bucket:
    """A size at which pictures are trained.

    Attributes:
        width, height: in pixels.
        images: number of images of this size.
        samples: the same, repeats included.
    """

    width: int
    height: int
    images: int
    samples: int


@dataclass(frozen=True)
class Epoch:
    """The samples that training draws.

    Attributes:
        samples: in an epoch, repeats included, without those that are held out.
        held_out: names of the images that are held out for validation.
        held_out_samples: how often these would have occurred.
        batch: samples of a step.
    """

    samples: int
    held_out: tuple[str, ...]
    held_out_samples: int
    batch: int

    def steps(self, epochs: float) -> int:
        """Steps of a number of epochs, rounded up."""
        return -int(-epochs * self.samples // self.batch)

    def epochs(self, steps: int) -> float:
        """Epochs of a number of steps."""
        return steps * self.batch / self.samples


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A checked folder.

    Attributes:
        folder: of the images.
        resolutions: sides in pixels of the squares whose area pictures are scaled to, the first one decisive here.
        multiple: sides are multiples of it.
        trigger: phrase in front of captions that lack it.
        images: facts about each usable image, in the order of the scan.
        skipped: each file or folder that is not used, with reason and remedy.
        notes: other remarks of the scan.
        buckets: sizes in training at the first resolution, the most frequent first.
        alike: groups of pictures of which one would do.
        epoch: samples of an epoch.
        limit: what the text encoder reads of a caption; None where tokens were not counted.
        findings: what to look at, the gravest kinds first.
        refused: the image files among `skipped`.
    """

    folder: Path
    resolutions: tuple[int, ...]
    multiple: int
    trigger: str
    images: tuple[CheckedImage, ...]
    skipped: tuple[tuple[Path, Reason], ...]
    notes: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    alike: tuple[LookAlikes, ...]
    epoch: Epoch
    limit: TokenLimit | None
    findings: tuple[Finding, ...]
    refused: tuple[Candidate, ...] = ()

    @property
    def captioned(self) -> int:
        """Number of images with a caption of their own."""
        return sum(one.is_captioned for one in self.images)

    def findings_of(self, index: int) -> list[FindingKind]:
        """The kinds of findings about an image."""
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
    batch: int = 1,
    validation_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> Preflight:
    """Check a scanned folder.

    Args:
        scan: of the folder.
        config: settings of the data.
        folder: that was scanned.
        resolution: the model's own, if the configuration leaves it open.
        multiple: least step of sides in pixels, the model's.
        tokenize: number of tokens of a caption, by the model's tokenizer; None to count none.
        limit: what the model reads of a caption.
        batch: samples of a step.
        validation_share: of the images held out, as for `split`.
        progress: called with (images done, all images).
        threads: that read images; None for as many as there are processors, at most 8.

    Raises:
        ImageError: an image can no longer be read.
        DataError: the resolution is below `multiple`.
    """
    resolutions = config.all_resolutions(resolution)
    step = pixel_step(config, multiple)
    frames = [plain_framings(image, config, resolution=resolution, step=step) for image in scan.images]
    with warnings.catch_warnings(action="ignore"):  # around all threads, as each file that is opened does it too
        qualities = list(_measured(scan.images, frames, threads, progress))
    count = partial(_tokens, tokenize, config) if tokenize else None
    images = tuple(
        _checked(image, quality, folder, found, count)
        for image, quality, found in zip(scan.images, qualities, frames, strict=True)
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
            trigger=config.trigger,
            upscale=config.upscale,
        ),
        refused=scan.refused,
    )


def plain_framings(image: ImageFile, config: DataConfig, *, resolution: int, step: int) -> tuple[Framing, ...]:
    """How an image is trained where it is not varied, at each resolution.

    Args:
        image: the image.
        config: resolutions, buckets, crop and masks.
        resolution: the model's, where `config` has none.
        step: sides are multiples of it.

    Raises:
        DataError: the limits of buckets exclude a resolution.
        ImageError: a mask that the crop follows can no longer be read.
    """
    mask = mask_of(image, config) if config.crop == "mask" else None
    return framings(
        image.width,
        image.height,
        replace(config, flip=False, picture_variants=1),
        resolution=resolution,
        multiple=step,
        name=image.name,
        centre=(0.5, 0.5) if mask is None else centre_of(mask),
    )


def epoch_of(images: Sequence[ImageFile], batch: int, validation_share: float | None) -> Epoch:
    """The samples of an epoch.

    Args:
        images: all of them; those of the subject's class are not counted.
        batch: samples of a step.
        validation_share: of the images held out, as for `split`.
    """
    subjects = [image for image in images if not image.is_class]
    names = list(dict.fromkeys(image.name for image in subjects))
    chosen = held_out_names(names, validation_share)
    apart = sum(image.repeats for image in subjects if image.name in chosen)
    total = sum(image.repeats for image in subjects)
    return Epoch(total - apart, tuple(name for name in names if name in chosen), apart, batch)


def name_in(folder: Path, path: Path) -> str:
    """A file's path relative to the folder, with slashes; of a file elsewhere its name."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def usual_resolution(images: Sequence[ImageFile]) -> int:
    """The largest usual resolution that most of the images fill, where no model decides it."""
    areas = [image.width * image.height for image in images]
    fitting = (side for side in _USUAL if sum(area >= side**2 for area in areas) >= _FILLED * len(areas))
    return next(fitting, _USUAL[-1])


def _measured(
    images: Sequence[ImageFile],
    frames: Sequence[Sequence[Framing]],
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterable[PictureQuality]:
    """The quality of each image at the largest of its sizes in training, as what is sharp there is sharp enough."""

    def measure(image: ImageFile, sizes: Sequence[Framing]) -> PictureQuality:
        longest = max(max(one.width, one.height) for one in sizes)
        return measured(open_still(image.path, min(MEASURED_EDGE, longest), grey=True))

    threads = threads or min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads, "read images") as pool:
        for start in range(0, len(images), _AHEAD):  # few are ahead, so that an interrupted check ends soon
            some = slice(start, start + _AHEAD)
            for done, quality in enumerate(pool.map(measure, images[some], frames[some]), start=start + 1):
                yield quality
                if progress:
                    progress(done, len(images))


def _checked(
    image: ImageFile,
    quality: PictureQuality,
    folder: Path,
    frames: Sequence[Framing],
    count: Callable[[ImageFile], int] | None,
) -> CheckedImage:
    largest = max(frames, key=lambda one: one.scale)  # decides whether the picture is large enough
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
    )


def _tokens(tokenize: Callable[[str], int], config: DataConfig, image: ImageFile) -> int:
    """Tokens of the longest of an image's captions, with what is put around it."""
    rules = CaptionRules.of(config, is_class=image.is_class)
    return max(tokenize(rules.plain([caption])) for caption in image.captions or ("",))


def _has_caption_file(image: Path) -> bool:
    """Whether there is a caption file that says nothing."""
    try:
        caption = read_caption(image)
    except DataError:  # where caption files are not used, they may be anything
        return False
    return caption is not None and not caption.text


def _compared(images: Sequence[CheckedImage], qualities: Sequence[PictureQuality]) -> Iterable[LookAlikes]:
    for group in look_alikes(qualities):
        best = max(group, key=lambda index: (*_worth(images[index]), -index))
        others = tuple(index for index in group if index != best)
        originals: dict[str, int] = {}
        copies = []
        for index in (best, *others):
            original = originals.setdefault(images[index].file.digest, index)
            copies += [(index, original)] if original != index else []
        yield LookAlikes(best, others, tuple(copies))


def _worth(image: CheckedImage) -> tuple[bool, int, bool, int]:
    """By which the best of pictures that look alike is chosen: sharp, large, captioned, little compressed."""
    file = image.file
    return not image.quality.is_blurred, file.width * file.height, image.is_captioned, file.path.stat().st_size


def _buckets(images: Sequence[CheckedImage]) -> tuple[Bucket, ...]:
    counts, samples = Counter(one.bucket for one in images), Counter[tuple[int, int]]()
    for one in images:
        samples[one.bucket] += one.file.repeats
    ordered = sorted(counts, key=lambda size: (-counts[size], size))
    return tuple(Bucket(*size, counts[size], samples[size]) for size in ordered)
