"""The images of a run in its folder: their record, and small versions of them for the report.

    thumbnails/0001.webp     the first image, and so on; its controls are on its left

A report shows these files alone, never those that a record names, which is untrusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import atomic_path, ensure_folder
from lorasmith.core.typed_json import typed
from lorasmith.data.captions import shared_phrase
from lorasmith.data.clips import open_still
from lorasmith.data.folder import ImageFile
from lorasmith.data.image_files import ImageError
from lorasmith.report.pictures import side_by_side
from lorasmith.runs.run_plan import RunPlan, captions_used
from lorasmith.training.storage.records import RunRecord

_THUMBNAILS = 60  # images of which a small version is kept: reading takes a moment for each

_RECORDED = 2000
_EDGE, _QUALITY = 192, 80
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True)
class RunImage:
    """An image of a run."""

    name: str
    caption: str = ""  # for the text encoder
    use: str = "trained"  # `trained`, `held out` or `class`
    repeats: int = 1  # number of its occurrences in an epoch
    controls: int = 0  # number of the pictures that an edit model gets beside its caption


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file that was not used, and why."""

    name: str
    reason: str


def subject_words(record: RunRecord) -> str:
    """What prompts call what a run learnt: its trigger, else the words that its captions share; empty without any."""
    trigger = record.source.get("trigger")
    if isinstance(trigger, str) and trigger.strip():
        return trigger.strip()
    images = [image.caption for image in images_in(record.data) if image.use != "class"]
    return shared_phrase(images or [sample.caption or "" for sample in record.samples])


def image_facts(plan: RunPlan) -> dict[str, Any]:
    """The images of a run as JSON values by name, for its record."""
    images = [
        RunImage(
            name=image.name,
            caption=image.caption,
            use="class" if image.is_class else "held out" if image.name in plan.held_out else "trained",
            repeats=image.repeats,
            controls=len(image.controls),
        )
        for image in plan.scan.images
    ]
    left_out = [LeftOut(name=path.name, reason=reason) for path, reason in plan.scan.skipped]
    return {
        "captions_used": captions_used(plan.scan.images, plan.trigger),
        "images": [asdict(image) for image in images[:_RECORDED]],
        "left_out": [asdict(skipped) for skipped in left_out[:_RECORDED]],
    }


def images_in(data: Mapping[str, Any]) -> tuple[RunImage, ...]:
    """The images in a record's data; none if they are not recorded, or not as `image_facts` does."""
    return _listed(data.get("images"), RunImage)


def left_out_in(data: Mapping[str, Any]) -> tuple[LeftOut, ...]:
    """The files in a record's data that were not used."""
    return _listed(data.get("left_out"), LeftOut)


def _listed(values: object, kind: type[_Kind]) -> tuple[_Kind, ...]:
    if not isinstance(values, Sequence):
        return ()
    try:
        return tuple(typed(value, kind) for value in values)
    except ValueError:
        return ()


def keep_thumbnails(folder: Path, images: Sequence[ImageFile]) -> None:
    """Write small versions of the first images into the folder of a run, unless they are there.

    As they are for the report alone, an unreadable image is skipped, and a full disk ends the loop.
    """
    missing = [
        ([control.path for control in (*image.controls, image)], path)
        for index, image in enumerate(images[:_THUMBNAILS])
        if not (path := thumbnail_of(folder, index)).exists()
    ]
    if not missing:
        return

    def write(pair: tuple[list[Path], Path]) -> None:
        sources, target = pair
        try:
            small = side_by_side([open_still(source, _EDGE) for source in sources])
            with atomic_path(target) as temporary:
                small.save(temporary, format="webp", quality=_QUALITY)
        except (ImageError, LorasmithError, OSError):
            return

    try:
        ensure_folder(folder / "thumbnails")
    except LorasmithError:
        return
    with ThreadPoolExecutor(thread_name_prefix="thumbnails") as pool:
        list(pool.map(write, missing))


def thumbnail_of(folder: Path, index: int) -> Path:
    """Path of the small version of the image with this index."""
    return folder / "thumbnails" / f"{index + 1:04}.webp"
