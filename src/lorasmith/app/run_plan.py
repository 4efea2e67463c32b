"""What a run on a folder of images will do, as data, and the events of its preparation: doors show both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event

if TYPE_CHECKING:
    from lorasmith.data.folder import FolderScan

__all__ = ["ImageEncoded", "ImagesFound", "ModelLoading", "RunPlan", "RunPlanned"]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do.

    Attributes:
        folder: of the images.
        scan: what the folder holds.
        trigger: phrase put in front of captions that lack it.
        model, family: titles of the base model and of its family.
        resolution: side in pixels of the square whose area pictures are scaled to.
        pixel_multiple: number of pixels that their sides divide by.
        trained: what is trained, in a line.
        parameters: trained numbers.
        config: settings, none of them open.
        notes: sentences about the settings that the person should read.
    """

    folder: Path
    scan: FolderScan
    trigger: str
    model: str
    family: str
    resolution: int
    pixel_multiple: int
    trained: str
    parameters: int
    config: TrainConfig
    notes: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Samples that the steps take in all."""
        return self.config.steps * self.config.batch_size * self.config.grad_accumulation_steps

    @property
    def samples_per_epoch(self) -> int:
        """Images, each as often as its folder says."""
        return sum(image.repeats for image in self.scan.images)

    @property
    def epochs(self) -> float:
        """How often each image is seen."""
        return self.samples / self.samples_per_epoch

    @property
    def prompt(self) -> str:
        """A prompt that shows what was learnt: the trigger, or the first caption."""
        return self.trigger or next((image.caption for image in self.scan.images if image.caption), "a picture")


@dataclass(frozen=True, kw_only=True)
class ImagesFound(Event):
    """The folder of images was read.

    Attributes:
        folder, scan, trigger: as in `RunPlan`.
    """

    folder: Path
    scan: FolderScan
    trigger: str


@dataclass(frozen=True, kw_only=True)
class ModelLoading(Event):
    """The base model is being loaded.

    Attributes:
        model: its file, folder, hub id or name.
    """

    model: str


@dataclass(frozen=True, kw_only=True)
class RunPlanned(Event):
    """Everything that does not depend on the encoded images is decided."""

    plan: RunPlan


@dataclass(frozen=True, kw_only=True)
class ImageEncoded(Event):
    """An image and its caption are ready for training.

    Attributes:
        done, total: images encoded so far, and in all.
    """

    done: int
    total: int
