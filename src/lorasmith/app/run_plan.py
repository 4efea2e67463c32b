"""The plan of a run on a folder as data, and the events of preparing it; doors show both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.training.config import ResolvedConfig
from lorasmith.training.events import Event

if TYPE_CHECKING:
    from lorasmith.app.data_check import DataCheck
    from lorasmith.data.folder import FolderScan, ImageFile
    from lorasmith.families.model_search import FoundPart

OWN_CAPTION, NO_CAPTION = "a caption of its own", "none"


def caption_counts(images: Sequence[ImageFile], trigger: str) -> dict[str, int]:
    """Number of images by what their caption is: `OWN_CAPTION`, `NO_CAPTION`, or in words what is used instead."""
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
    """What the captions of images are, in words and with numbers."""
    counts = caption_counts(images, trigger)
    return ", ".join(f"{what.rstrip(',')} for {count:,} of {len(images):,} images" for what, count in counts.items())


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Summary of a prepared run.

    Attributes:
        folder: of the images.
        scan: the images, those of the subject's class included.
        held_out: names of the images that are held out for validation.
        trigger: phrase put in front of captions that lack it.
        model, family: titles of the base model and of its family.
        found: its parts that were found in the model folders.
        resolutions: sides in pixels of the squares whose area pictures are scaled to.
        pixel_multiple: their sides are multiples of it.
        data: further settings of the data that have not their default values.
        trained: algorithm, targets and parameter count in one line.
        parameters: number of trained parameters.
        config: settings, all resolved.
        notes: remarks for the user, one sentence each.
    """

    folder: Path
    scan: FolderScan
    trigger: str
    model: str
    family: str
    found: tuple[FoundPart, ...] = ()
    resolutions: tuple[int, ...]
    pixel_multiple: int
    data: Mapping[str, Any] = field(default_factory=dict)
    trained: str
    parameters: int
    config: ResolvedConfig
    notes: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples in all steps."""
        return self.config.steps * self.config.samples_per_step

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in an epoch, repeats included and held-out images left out."""
        return sum(one.repeats for one in self.scan.images if one.is_class or one.name not in self.held_out)

    @property
    def epochs(self) -> float:
        """Number of epochs."""
        return self.samples / self.samples_per_epoch

    @property
    def prompt(self) -> str:
        """A prompt for the trained subject: the trigger, or the first caption."""
        return self.trigger or next((image.caption for image in self.scan.images if image.caption), "a picture")


@dataclass(frozen=True, kw_only=True)
class ImagesFound(Event):
    """The folder of images was scanned.

    Attributes:
        folder, scan, trigger: as in `RunPlan`.
    """

    folder: Path
    scan: FolderScan
    trigger: str


@dataclass(frozen=True, kw_only=True)
class ImagesChecked(Event):
    """The images were checked, before any is encoded.

    Attributes:
        check: what was found.
    """

    check: DataCheck


@dataclass(frozen=True, kw_only=True)
class ModelLoading(Event):
    """The base model is being loaded.

    Attributes:
        model: its file, folder, hub id or name.
    """

    model: str


@dataclass(frozen=True, kw_only=True)
class RunPlanned(Event):
    """The run is planned; images are not encoded yet."""

    plan: RunPlan


@dataclass(frozen=True, kw_only=True)
class ClassImageDrawn(Event):
    """The base model has drawn a picture of the subject's class.

    Attributes:
        done, total: pictures drawn so far, and all that were missing.
    """

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class EncodersHashed(Event):
    """A tensor of an encoder was hashed, by which cached encodings are found.

    Attributes:
        done, total: tensors of the encoder hashed so far, and all of them.
    """

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class ImageEncoded(Event):
    """An image and its caption were encoded.

    Attributes:
        done, total: images encoded so far, and all images.
        cached: those of all that were in the cache.
    """

    done: int
    total: int
    cached: int = 0
