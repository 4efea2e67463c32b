"""Pictures that a program has, in memory or by path, as a source of a run.

Items are read once, in order, from a list, a generator or a torch dataset. Each picture in memory is written to a
temporary file without compression, so that one at a time is held, and what follows is that of files: buckets, crops,
variants, masks, checks, and the cache. The file's bytes are a function of the pixels, and so are digests.

    (picture, caption), (picture, [caption, ...]), (picture, caption, mask)
    {"image": picture, "text": caption, "mask": mask}    also file_name, repeats, weight; video and frame_rate for clips
    {"image": picture, "text": caption, "control": before}    for edit models, or a list; the fields of `control_fields`
    "photos/1.png"                                       a file, with its caption file as in a folder

Values are never guessed: what is neither uint8 nor a float in 0..1 is refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lorasmith.core.errors import DataError, OptionError, OutputError
from lorasmith.core.folders import file_stem
from lorasmith.core.options import options_of
from lorasmith.core.printable import described, printable
from lorasmith.data.captions import MAX_CAPTION
from lorasmith.data.clips import OpenedFile, seconds_read, steady_times
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.folder_listing import ListedFolder
from lorasmith.data.image_files import upright_original
from lorasmith.data.metadata_files import MAX_CAPTIONS, NAME_COLUMNS, TEXT_COLUMNS, control_fields
from lorasmith.data.source_files import Candidate, ScanNotes, candidates

_PICTURE, _CLIP = "image", "video"
_CHANNELS = (1, 3, 4)
_ROUNDING = 1 / 512  # half a step of 8 bits: what float arithmetic may exceed 0..1 by

_FORMS = 'a pair (picture, caption), a dict such as {"image": picture, "text": caption}, or the path of a picture'
_SHAPES = "(height, width), (height, width, C) or (C, height, width) with C of 1, 3 or 4"
_CLIP_SHAPES = "(frames, height, width, C) or (frames, C, height, width) with C of 1, 3 or 4"


@dataclass(frozen=True)
class PictureItems:
    """A source of pictures that a program has."""

    items: Iterable[object]  # read once
    spool: Path  # folder for those in memory, the caller's to remove
    rate: float = 0.0  # frames per second of clips that do not say it
    names_files: bool = True  # paths are the caller's own, not those of a dataset that another person made

    path = "the given data"  # in messages


@dataclass(frozen=True)
class _Item:
    number: int
    picture: object
    captions: tuple[str, ...] = ()
    mask: object = None
    controls: tuple[object, ...] = ()
    name: str = ""
    repeats: int = 1
    weight: float = 1.0
    rate: float = 0.0  # of a clip that says it
    is_clip: bool = False  # it is said to be one

    @property
    def title(self) -> str:
        return f"item {self.number}" + (f" ({self.name})" if self.name else "")


def items_of(sequence: object) -> Iterable[object] | None:
    """The items of a generator, an iterable or a torch dataset of either style; None if `given` is none of these."""
    if isinstance(sequence, str | bytes | Mapping | np.ndarray | torch.Tensor | DataLoader | type):
        return None
    if isinstance(sequence, Iterable):
        return sequence
    if hasattr(sequence, "__getitem__") and hasattr(sequence, "__len__"):
        return (sequence[number] for number in range(len(sequence)))
    return None


def item_candidates(source: PictureItems, config: DataConfig, *, clips: bool) -> Iterator[Candidate]:
    """The pictures of the items, those in memory written to the spool, in order. Raises DataError or OutputError."""
    listings = _Listings(config, clips)
    for number, given in enumerate(source.items):
        item = _read(number, given)
        files = (item.picture, item.mask, *item.controls)
        if not source.names_files and any(isinstance(file, str | os.PathLike) for file in files):
            raise DataError(
                f"a dataset must hold its pictures, got a path in {item.title}, which is not read; load the files that "
                "you trust as a list of paths"
            )
        if isinstance(item.picture, str | os.PathLike):
            candidate = listings.candidate(Path(item.picture))
            candidate = replace(candidate, repeats=item.repeats, weight=item.weight)
            if item.captions:
                candidate = replace(candidate, caption_file=None, metadata=item.title, entry=item.captions, refused="")
        else:
            candidate = _written(item, source, config, clips)
        if item.mask is not None:
            candidate.mask = _mask(item, source.spool / f"{number}" / f"{candidate.name}.mask", config)
        if item.controls and config.controls != "none":
            place = source.spool / f"{number}"
            candidate.controls = tuple(
                _beside(item, control, "control", place / f"{candidate.name}.control {index}")
                for index, control in enumerate(item.controls)
            )
        yield candidate


class _Listings:
    """Files by path, with the captions and masks beside them; each folder is listed once."""

    def __init__(self, config: DataConfig, clips: bool) -> None:
        self._config, self._clips = replace(config, recursive=False), clips
        self._known: dict[str, dict[str, Candidate]] = {}

    def candidate(self, path: Path) -> Candidate:
        folder = str(path.parent)
        if folder not in self._known:
            self._known[folder] = self._listed(folder)
        listed = ListedFolder(folder, "", path.parent.resolve(), self._config.follow_links)
        return self._known[folder].get(path.name) or Candidate(listed, path.name, 1, 1.0, self._clips)

    def _listed(self, folder: str) -> dict[str, Candidate]:
        found: dict[str, Candidate] = {}
        if Path(folder).is_dir():
            for candidate in candidates(
                ImageSource(folder), self._config, cache=None, skipped=[], notes=ScanNotes(), clips=self._clips
            ):
                if candidate.folder.inside:
                    break
                found[candidate.name] = candidate
        return found


def _read(number: int, content: object) -> _Item:
    item = _Item(number, content)
    if isinstance(content, str | os.PathLike):
        return item
    if isinstance(content, tuple | list) and len(content) in (2, 3):
        picture, caption, *mask = content
        return replace(item, picture=picture, captions=_captions(item, caption), mask=mask[0] if mask else None)
    if isinstance(content, Mapping):
        return _of_fields(item, content)
    if isinstance(content, Image.Image | np.ndarray | torch.Tensor):
        raise DataError(
            f"{item.title} must have a caption beside its picture, got {described(content)} alone; give {_FORMS}, with "
            "the caption None for the trigger"
        )
    raise DataError(f"{item.title} must be {_FORMS}, got {described(content)}")


def _of_fields(item: _Item, fields: Mapping[Any, Any]) -> _Item:
    named = next((str(fields[key]) for key in NAME_COLUMNS if fields.get(key) is not None), "")
    picture = next((fields[key] for key in (_PICTURE, _CLIP) if fields.get(key) is not None), None)
    if picture is None and not named:
        known = printable(", ".join(map(str, fields)) or "none", limit=80)
        raise DataError(f"{item.title} must have a picture as image (or a path as file_name), got the fields {known}")
    settings = {}
    for key, declared in options_of(ImageSource).items():
        if fields.get(key) is not None:
            settings[key] = declared.check(fields[key])
    controls = control_fields(fields)
    if stray := [key for key in fields if "control" in str(key) and key not in controls and fields[key] is not None]:
        raise DataError(
            f"controls are named control, a picture or a list of them, got {stray[0]} in {item.title}; rename it"
        )
    rate = fields.get("frame_rate")
    if rate is not None and not (isinstance(rate, Real) and 0 < float(rate) <= 1000):
        raise DataError(f"frame_rate of {item.title} must be a number between 0 and 1000, got {described(rate)}")
    return replace(
        item,
        picture=named if picture is None else picture,
        name="" if picture is None else _file_name(named),
        captions=_captions(item, next((fields[key] for key in TEXT_COLUMNS if fields.get(key) is not None), None)),
        mask=fields.get("mask"),
        controls=tuple(control for key in controls for control in _listed(fields[key]) if control is not None),
        rate=float(rate or 0),
        is_clip=fields.get(_PICTURE) is None and picture is not None,
        **settings,
    )


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)


def _file_name(named: str) -> str:
    """The last part of a name, as a file may have it; empty if there is none."""
    name = named.replace("\\", "/").rpartition("/")[2].strip(". ")
    return file_stem(name) if name else ""


def _captions(item: _Item, captions: object) -> tuple[str, ...]:
    texts = () if captions is None else (captions,) if isinstance(captions, str) else captions
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"the caption of {item.title} must be a text, a list of texts or None, got {described(captions)}; write "
            "out what the picture shows"
        )
    if len(texts) > MAX_CAPTIONS or sum(map(len, texts)) > MAX_CAPTION:
        raise DataError(
            f"{item.title} must have at most {MAX_CAPTIONS} captions of {MAX_CAPTION:,} characters together, got "
            f"{len(texts):,} of {sum(map(len, texts)):,}; shorten them"
        )
    return tuple(texts)


def _written(item: _Item, source: PictureItems, config: DataConfig, clips: bool) -> Candidate:
    """An item's picture or clip as a file of the spool."""
    if config.captions in ("filename", "folder"):
        raise OptionError(
            f"captions {config.captions} is for files, got a picture in memory as {item.title}; leave captions at "
            "files, or choose none"
        )
    rate = item.rate or source.rate
    frames = _frames(item, most=1 + int(rate * seconds_read(config)) if rate else None)
    is_clip = len(frames) > 1 or item.is_clip
    if is_clip and not clips:
        raise DataError(
            f"{item.title} is a clip of {len(frames)} frames, on which models of pictures are not trained; give "
            "pictures one by one, or choose a model of videos"
        )
    name = item.name or f"{'clip' if is_clip else 'picture'} {item.number}"
    folder = ListedFolder(str(source.spool / str(item.number)), "", source.spool.resolve(), follow_links=False)
    candidate = Candidate(folder, name, item.repeats, item.weight, clips, metadata=item.title, entry=item.captions)
    _save(frames, candidate.path)
    if is_clip:
        candidate.opened = OpenedFile(*frames[0].size, steady_times(len(frames), rate))
    return candidate


def _mask(item: _Item, path: Path, config: DataConfig) -> Path:
    """The file of an item's mask, `path` if it is in memory."""
    if config.masks == "alpha":
        raise DataError(f"{item.title} has a mask, which masks alpha leaves aside; choose masks files, or leave it out")
    mask = item.mask
    if isinstance(mask, np.ndarray | torch.Tensor) and mask.dtype in (np.bool_, torch.bool):
        mask = mask.astype(np.uint8) * 255 if isinstance(mask, np.ndarray) else mask.to(torch.uint8) * 255
    return _beside(item, mask, "mask", path)


def _beside(item: _Item, picture: object, what: str, path: Path) -> Path:
    """The file of an item's mask or control, `path` if it is in memory."""
    if isinstance(picture, str | os.PathLike):
        return Path(picture)
    _save(_frames(replace(item, picture=picture, name=f"its {what}"), most=1), path)
    return path


def _save(frames: Sequence[Image.Image], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
        frames[0].save(path, "TIFF", **more)
    except (OSError, struct.error) as error:
        raise OutputError(
            f"a picture cannot be written to the temporary folder {path.parents[1]} ({error}); free space there, or "
            "name another folder in TMPDIR"
        ) from error


def _frames(item: _Item, *, most: int | None) -> list[Image.Image]:
    """An item's picture, or the first frames of its clip, in 8 bits."""
    picture = item.picture
    if isinstance(picture, Image.Image):
        try:
            array = np.asarray(upright_original(picture))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"the picture of {item.title} cannot be read ({error}); open it again") from error
    elif isinstance(picture, torch.Tensor):
        plain = picture.detach().cpu()
        array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    elif isinstance(picture, np.ndarray):
        array = picture
    else:
        raise DataError(
            f"the picture of {item.title} must be a PIL picture, a numpy array, a torch tensor or a path, got "
            f"{described(picture)}"
        )
    array = _channels_last(array, item)
    pixels = [_eight_bits(frame, item) for frame in (array[:most] if array.ndim == 4 else array[None])]
    return [Image.fromarray(pixel[..., 0] if pixel.shape[-1] == 1 else pixel) for pixel in pixels]


def _channels_last(array: np.ndarray, item: _Item) -> np.ndarray:
    """An array as (height, width, C), or as (frames, height, width, C)."""
    shape = array.shape
    if array.ndim == 2:
        return array[..., None]
    if array.ndim in (3, 4):
        first, last = shape[-3] in _CHANNELS, shape[-1] in _CHANNELS
        if first and last:  # a side of so few pixels is none, so one of both is the frames of a clip, or an error
            raise DataError(
                f"an array must say where its channels are, got the shape {shape} for {item.title}, in which both ends "
                f"could be; sides have at least 16 pixels"
            )
        if (first or last) and 0 not in shape:
            return array if last else np.moveaxis(array, -3, -1)
    raise DataError(
        f"an array must be {_SHAPES}, a clip {_CLIP_SHAPES}, got the shape {shape} for {item.title}; transpose it"
    )


def _eight_bits(array: np.ndarray, item: _Item) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"an array must be uint8 or floats in 0..1, got {array.dtype} for {item.title}; convert it")
    least, most = float(array.min()), float(array.max())
    if not (least >= -_ROUNDING and most <= 1 + _ROUNDING):  # NaN is refused, too
        remedy = "with (x + 1) / 2 if it is in -1..1" if least < 0 else "with x / 255 if it is in 0..255"
        raise DataError(
            f"floats must be finite and in 0..1, got {least:g} to {most:g} for {item.title}; convert it {remedy}"
        )
    return (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
