"""Controls of a scanned folder, which edit models are given beside a caption: whether they fit, and their framings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.printable import count_text
from lorasmith.data.clips import clip_form
from lorasmith.data.crops import Framing, bucket_size, centred, framed
from lorasmith.data.data_config import DataConfig
from lorasmith.data.dataset import SeenPicture
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.picture_encoding import FramedImage
from lorasmith.families.forms import ControlForm
from lorasmith.families.model import Model

_NAMED = 3  # images in a sentence
_OPTIONAL = "or choose controls optional"


def check_controls(scan: FolderScan, config: DataConfig, model: Model) -> None:
    """Raise DataError if the controls of a folder do not fit a model, or one is missing, or a clip is too short."""
    form, title = model.control_form, f"{model.title} ({model.family.title})"
    if config.controls == "opposite":
        _check_opposites(scan, config, form, title)
        return
    subjects = [image for image in scan.images if not image.is_class]
    paired = [subject for subject in subjects if subject.controls]
    if form.frames and form.is_required:
        _check_clips(scan, config, model)
    if config.controls == "none":
        return
    if form.is_fill:
        _check_masks(subjects, config, title)
    if not form.most or not form.are_files:
        if paired or config.control:
            variants = [control.name for control in model.family.controls if control.name and not form.most]
            what = f"{paired[0].name} has {paired[0].controls[0].path}" if paired else f"control is {config.control[0]}"
            without = "leave control out" if config.control else "choose controls none"
            edit = f"choose edit {' or '.join(variants)} if it is an edit model, or " if variants else ""
            takes = "none beside its images" if form.most else "no controls"
            raise DataError(f"{title} takes {takes}, but {what}; {edit}{without} to train without them")
        return
    if many := next((image for image in paired if len(image.controls) > form.most), None):
        raise DataError(f"{title} {form.count_text}, but {many.name} has {len(many.controls)}; remove some")
    if paired and form.sight is not None:
        model.text_encoder.check_sight()
    is_tried = paired or any(reason.kind == "control" for _, reason in scan.skipped)
    if config.controls != "optional" and (form.is_required or config.control or is_tried):
        check_pairs(scan, config, title=title)


def check_pairs(scan: FolderScan, config: DataConfig, *, title: str) -> None:
    """Raise DataError unless each image has a control, and all as many; `title` is of what needs them."""
    otherwise = "or leave pairs out" if config.controls == "opposite" else _OPTIONAL
    subjects = [image for image in scan.images if not image.is_class]
    paired = [subject for subject in subjects if subject.controls]
    damaged = [(path, reason) for path, reason in scan.skipped if reason.kind == "control"]
    if damaged:
        raise DataError(f"{damaged[0][0].name} {damaged[0][1]}, {otherwise}")
    if not paired:
        where = f"in {', '.join(config.control)}" if config.control else "in a folder control, or named by --control"
        raise DataError(
            f"{title} needs a control for each image, but none of {count_text(len(subjects), 'image')} has a file of "
            f"its name {where}; add them, {otherwise}"
        )
    if missing := [subject.name for subject in subjects if not subject.controls]:
        raise DataError(
            f"each image needs a control, but there is none for {_listed(missing)}; add a file of the same name to "
            f"{paired[0].controls[0].path.parent}, {otherwise}"
        )
    first = paired[0]
    if other := next((image for image in paired if len(image.controls) != len(first.controls)), None):
        raise DataError(
            f"all images need as many controls, but {first.name} has {len(first.controls)} and {other.name} "
            f"{len(other.controls)}; add or remove some, {otherwise}"
        )


def _check_opposites(scan: FolderScan, config: DataConfig, form: ControlForm, title: str) -> None:
    """Raise DataError unless each image is a picture with one opposite, and the model draws from text alone."""
    if form.is_required or not form.are_files:
        raise DataError(f"{title} is given pictures beside a caption, and is not trained on pairs; leave pairs out")
    if clip := next((image for image in scan.images if image.times), None):
        raise DataError(f"pairs are of pictures, but {clip.name} is a clip; remove it")
    check_pairs(scan, config, title="pairs")
    first = scan.images[0]
    if len(first.controls) > 1:
        raise DataError(f"pairs are of two pictures, but {first.name} has {len(first.controls)} controls; remove some")


def _check_clips(scan: FolderScan, config: DataConfig, model: Model) -> None:
    """Raise DataError unless each file is a clip of several latents, which are drawn from its first frame."""
    title, clips = f"{model.title} ({model.family.title})", clip_form(model, config)
    if config.control_dropout or config.controls == "none":
        raise DataError(
            f"{title} always draws from a picture, got control_dropout {config.control_dropout:g} and controls "
            f"{config.controls}; leave both out"
        )
    assert clips is not None
    least = 1 + clips.latent.time_downscale
    for image in scan.images:
        frames = len(clips.numbers(image.times)) if image.times else 1
        if frames < least:
            what = f"{clips.available(image.times)} frames at {clips.rate:g} a second" if image.times else "one"
            raise DataError(
                f"{title} draws a clip from its first frame, and needs at least {least} frames, but {image.name} has "
                f"{what}; remove it, or train it with a text-to-video model"
            )


def _check_masks(images: Sequence[ImageFile], config: DataConfig, title: str) -> None:
    """Raise DataError for an image without a mask, for a model that paints what a mask covers."""
    what = f"{title} paints what a mask covers"
    if config.masks == "alpha":  # which is laid on white
        raise DataError(f"{what} from what is around it, which transparency hides; choose --masks files")
    missing = [image.name for image in images if image.mask is None]
    if missing and config.controls != "optional":
        raise DataError(
            f"{what}, but there is none for {_listed(missing)}; add NAME.mask.png beside it and --masks files, "
            f"{_OPTIONAL} to paint whole pictures"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def has_aspect_of(control: ImageFile, image: ImageFile) -> bool:
    """Whether both have one aspect ratio, but for a pixel."""
    across, down = control.width * image.height, control.height * image.width
    return abs(across - down) <= max(image.width + image.height, control.width + control.height)


def control_framings(
    control: ImageFile, image: ImageFile, framings: Sequence[Framing], form: ControlForm | None
) -> list[Framing]:
    """The framing of a control for each framing of its image, mirrored and coloured alike.

    An aligned control has the image's size and part, or if its aspect ratio is another one, a size of as many pixels.
    Without a form it is an opposite, which always has the image's size.
    """
    return [_control_framing(control, image, framing, form) for framing in framings]


def seen_with(image: FramedImage, form: ControlForm | None) -> list[tuple[SeenPicture, ...]]:
    """What the text encoder sees of the controls of an image, for each of its framings."""
    found: list[tuple[SeenPicture, ...]] = [()] * len(image.framings)
    if form is None or form.sight is None:
        return found
    for control in image.image.controls:
        shown = []
        for control_framing in control_framings(control, image.image, image.framings, form):
            width, height = form.sight.size(control_framing.width, control_framing.height)
            shown.append(replace(control_framing, width=width, height=height))
        keys = FramedImage(control, tuple(shown), (control.digest, "")).keys()
        pictures = (
            SeenPicture(key, partial(_pixels, control, framing)) for key, framing in zip(keys, shown, strict=True)
        )
        found = [(*before, picture) for before, picture in zip(found, pictures, strict=True)]
    return found


def _pixels(control: ImageFile, framing: Framing) -> Tensor:
    """(1, 3, height, width) in [−1, 1]."""
    return framed(control, control.digest, [framing], DataConfig(), downscale=1)[0].pixels[None]


def _control_framing(control: ImageFile, image: ImageFile, framing: Framing, form: ControlForm | None) -> Framing:
    width, height = control.width, control.height
    if (form is None or form.is_aligned) and has_aspect_of(control, image):
        x, y = width / image.width, height / image.height
        left, top, right, bottom = framing.box
        return replace(framing, box=(left * x, top * y, right * x, bottom * y))
    if form is None:
        columns, rows = framing.width, framing.height
    elif form.is_aligned:
        edge = math.ceil(math.sqrt(framing.width * framing.height) / form.multiple)  # of the square bucket
        columns, rows = bucket_size(width, height, resolution=edge * form.multiple, multiple=form.multiple)
    else:
        columns, rows = form.size(width, height)
    return replace(framing, width=columns, height=rows, box=centred((width, height), (columns, rows)))
