"""Controls of a scanned folder, which edit models are given beside a caption: whether they fit, and their framings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text
from lorasmith.data.crops import Framing, bucket_size, centred
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.families.base import ControlForm, controls_taken
from lorasmith.families.model import Model

_NAMED = 3  # images in a sentence
_OPTIONAL = "or choose controls optional"


def check_controls(scan: FolderScan, config: DataConfig, model: Model) -> None:
    """Raise DataError if the controls of a folder do not fit a model, or one is missing."""
    if config.controls == "none":
        return
    form, title = model.control_form, f"{model.title} ({model.family.title})"
    paired = [one for one in scan.images if one.controls]
    if form is None:
        if paired or config.control:
            variants = [one.name for one in model.family.controls if one.name]
            what = f"{paired[0].name} has {paired[0].controls[0].path}" if paired else f"control is {config.control[0]}"
            without = "leave control out" if config.control else "choose controls none"
            edit = f"choose edit {' or '.join(variants)} if it is an edit model, or " if variants else ""
            raise DataError(f"{title} takes no controls, but {what}; {edit}{without} to train without them")
        return
    if many := next((one for one in paired if len(one.controls) > form.most), None):
        raise DataError(f"{title} {controls_taken(form.most)}, but {many.name} has {len(many.controls)}; remove some")
    is_tried = paired or any(reason.kind == "control" for _, reason in scan.skipped)
    if config.controls != "optional" and (form.is_required or config.control or is_tried):
        check_pairs(scan, config, title=title)


def check_pairs(scan: FolderScan, config: DataConfig, *, title: str) -> None:
    """Raise DataError unless each image has a control, and all as many; `title` is of what needs them."""
    subjects = [one for one in scan.images if not one.is_class]
    paired = [one for one in subjects if one.controls]
    damaged = [(path, reason) for path, reason in scan.skipped if reason.kind == "control"]
    if damaged:
        raise DataError(f"{damaged[0][0].name} {damaged[0][1]}, {_OPTIONAL}")
    if not paired:
        where = f"in {', '.join(config.control)}" if config.control else "in a folder control, or named by --control"
        raise DataError(
            f"{title} needs a control for each image, but none of {count_text(len(subjects), 'image')} has a file of "
            f"its name {where}; add them, {_OPTIONAL}"
        )
    if missing := [one.name for one in subjects if not one.controls]:
        more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
        names, place = ", ".join(missing[:_NAMED]), paired[0].controls[0].path.parent
        raise DataError(
            f"each image needs a control, but there is none for {names}{more}; add a file of the same name to {place}, "
            f"{_OPTIONAL}"
        )
    first = paired[0]
    if other := next((one for one in paired if len(one.controls) != len(first.controls)), None):
        raise DataError(
            f"all images need as many controls, but {first.name} has {len(first.controls)} and {other.name} "
            f"{len(other.controls)}; add or remove some, {_OPTIONAL}"
        )


def has_aspect_of(control: ImageFile, image: ImageFile) -> bool:
    """Whether both have one aspect ratio, but for a pixel."""
    across, down = control.width * image.height, control.height * image.width
    return abs(across - down) <= max(image.width + image.height, control.width + control.height)


def control_framings(
    control: ImageFile, image: ImageFile, framings: Sequence[Framing], form: ControlForm
) -> list[Framing]:
    """The framing of a control for each framing of its image, mirrored and coloured alike.

    An aligned control has the image's size and part, or if its aspect ratio is another one, a size of as many pixels.
    """
    return [_control_framing(control, image, one, form) for one in framings]


def _control_framing(control: ImageFile, image: ImageFile, framing: Framing, form: ControlForm) -> Framing:
    width, height = control.width, control.height
    if form.is_aligned and has_aspect_of(control, image):
        x, y = width / image.width, height / image.height
        left, top, right, bottom = framing.box
        return replace(framing, box=(left * x, top * y, right * x, bottom * y))
    if form.is_aligned:
        edge = math.ceil(math.sqrt(framing.width * framing.height) / form.multiple)  # of the square bucket
        columns, rows = bucket_size(width, height, resolution=edge * form.multiple, multiple=form.multiple)
    else:
        columns, rows = form.size(width, height)
    return replace(framing, width=columns, height=rows, box=centred((width, height), (columns, rows)))
