"""The plan of a run on a folder as data, and the events of preparing it; commands and server show both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.training.config import ResolvedConfig
from lorasmith.training.events import Event

if TYPE_CHECKING:
    from lorasmith.data.folder import FolderScan, ImageFile
    from lorasmith.families.model_search import FoundPart
    from lorasmith.runs.data_check import DataCheck

OWN_CAPTION, NO_CAPTION = "a caption of its own", "none"


def caption_counts(images: Sequence[ImageFile], trigger: str) -> dict[str, int]:
    """Number of images by the kind of caption: `OWN_CAPTION`, `NO_CAPTION`, or in words the text used instead."""
    counts: Counter[str] = Counter()
    for image in images:
        match image.caption_source:
            case "trigger":
                counts[f"the trigger {trigger!r}"] += 1
            case "folder":
                counts[f"the name of the folder, {image.caption!r},"] += 1
            case "class":
                counts["the prompt of the class"] += 1
            case "none":
                counts[NO_CAPTION] += 1
            case _:
                counts[OWN_CAPTION] += 1
    return dict(counts)


def captions_used(images: Sequence[ImageFile], trigger: str) -> str:
    """`caption_counts` in words."""
    counts = caption_counts(images, trigger)
    return ", ".join(f"{what.rstrip(',')} for {count:,} of {len(images):,} images" for what, count in counts.items())


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Summary of a prepared run."""

    folder: Path
    scan: FolderScan  # images of the subject's class included
    trigger: str  # phrase put in front of captions that lack it
    model: str  # title
    family: str  # title
    found: tuple[FoundPart, ...] = ()  # parts found in the model folders
    resolutions: tuple[int, ...]  # sides in pixels of squares; pictures are scaled to their areas
    pixel_multiple: int  # of the sides of pictures
    data: Mapping[str, Any] = field(default_factory=dict)  # further settings of the data that are not defaults
    trained: str  # algorithm, targets and parameter count in one line
    parameters: int  # number of trained parameters
    config: ResolvedConfig
    notes: tuple[str, ...]  # for the user, one sentence each
    held_out: tuple[str, ...] = ()  # names of the images held out for validation

    @property
    def samples(self) -> int:
        """In all steps."""
        return self.config.steps * self.config.samples_per_step

    @property
    def samples_per_epoch(self) -> int:
        """Repeats included, held-out images left out."""
        return sum(image.repeats for image in self.scan.images if image.is_class or image.name not in self.held_out)

    @property
    def epochs(self) -> float:
        return self.samples / self.samples_per_epoch

    @property
    def prompt(self) -> str:
        """A prompt for the trained subject: the trigger, or the first caption."""
        return self.trigger or next((image.caption for image in self.scan.images if image.caption), "a picture")

    @property
    def controls(self) -> tuple[Path, ...]:
        """The controls of the first image that has some, to draw a first picture from; opposites are not given."""
        if self.data.get("controls") == "opposite":
            return ()
        return next(
            (tuple(control.path for control in image.controls) for image in self.scan.images if image.controls), ()
        )


@dataclass(frozen=True, kw_only=True)
class ImagesFound(Event):
    """The folder of images was scanned."""

    folder: Path
    scan: FolderScan
    trigger: str


@dataclass(frozen=True, kw_only=True)
class ImagesChecked(Event):
    """The images were checked, before any is encoded."""

    check: DataCheck


@dataclass(frozen=True, kw_only=True)
class ModelLoading(Event):
    """The base model is being loaded."""

    model: str  # file, folder, hub id or built-in name


@dataclass(frozen=True, kw_only=True)
class RunPlanned(Event):
    """The run is planned; images are not encoded yet."""

    plan: RunPlan


@dataclass(frozen=True, kw_only=True)
class ClassImageDrawn(Event):
    """The base model has drawn one of the `total` missing pictures of the subject's class."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class EncodersHashed(Event):
    """A tensor of an encoder was hashed, for the keys of cached encodings; `total` is per encoder."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class ImageEncoded(Event):
    """An image and its caption were encoded."""

    done: int
    total: int
    cached: int = 0  # number of all images that were in the cache
