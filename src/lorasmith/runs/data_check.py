"""A folder of images checked before training, with the model's sizes and tokenizer where a model is named; its page.

The pictures of the page are read from the folder again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorasmith.core.files import is_folder, write_atomic
from lorasmith.core.folders import Folders
from lorasmith.core.printable import count_text
from lorasmith.data.clips import ClipForm, clip_form, open_still
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.encoding import datasets_folder
from lorasmith.data.fetched_folder import local_sources
from lorasmith.data.findings import CaptionKeys, CheckedImage, Finding, FindingKind, TokenLimit, joined, tags_of
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.image_files import ImageError
from lorasmith.data.preflight import Preflight, name_in, preflight, usual_resolution
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import load_completed
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.report.data_page import DataReport, PictureCard, SizeRow, Trouble, data_page
from lorasmith.report.pictures import picture_uri, side_by_side
from lorasmith.runs.command_lines import arguments_for, command_line, positional
from lorasmith.runs.photo_likeness import with_likeness

_MULTIPLE = 16  # step of sides where no model decides it: that of most families


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The result of checking a folder."""

    preflight: Preflight
    model: str | None  # title of the model; None without one
    is_size_assumed: bool  # the resolution is guessed from the images


def check_folder(
    folder: str | Path,
    config: DataConfig,
    *,
    files: ModelFiles | None = None,
    folders: Folders | None = None,
    batch: int = 1,
    validation_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Scan and check the images of an `ImageSource` path; `files` are those of the model, whose weights are not read.

    `folders` are searched for parts that the model lacks, and `progress` receives (images done, all images).
    """
    model = None if files is None else load_completed(files, folders).model
    (source,) = local_sources([ImageSource(str(folder))], config, datasets_folder())
    folder = Path(source.path)
    scan = scan_folder(folder, config, clips=model is None or clip_form(model, config) is not None)
    folder = folder if is_folder(folder) else folder.parent  # a metadata file is beside its images
    check = check_scan(
        scan, config, folder=folder, model=model, batch=batch, validation_share=validation_share, progress=progress
    )
    return replace(check, preflight=with_likeness(check.preflight))


def check_scan(
    scan: FolderScan,
    config: DataConfig,
    *,
    folder: Path,
    model: Model | None = None,
    batch: int = 1,
    validation_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Check a scanned folder, with usual sizes if there is no model; see `check_folder`."""
    tokenize, limit = token_counter(model) if model is not None else (None, None)
    keys = () if model is None else model.family.caption_keys
    checked = preflight(
        scan,
        config,
        folder=folder,
        resolution=usual_resolution(scan.images) if model is None else model.defaults.resolution,
        multiple=_MULTIPLE if model is None else model.defaults.pixel_multiple,
        tokenize=tokenize,
        limit=limit,
        keys=CaptionKeys(model.family.title, keys) if model is not None and keys else None,
        form=None if model is None else model.control_form,
        batch=batch,
        validation_share=validation_share,
        progress=progress,
    )
    if model is not None and (clips := clip_form(model, config)) is not None:
        checked = replace(checked, notes=(*checked.notes, *_clip_notes(scan, clips, config)))
    return DataCheck(
        preflight=checked,
        model=None if model is None else model.title,
        is_size_assumed=model is None and config.resolution is None,
    )


def _clip_notes(scan: FolderScan, clips: ClipForm, config: DataConfig) -> Iterator[str]:
    """Notes on clips of other frame rates than the model's, and of fewer frames than were asked for."""
    timed = [(image.name, image.times) for image in scan.images if image.times]
    if resampled := [f"{name} ({what})" for name, times in timed if (what := clips.resampled(times))]:
        yield (
            f"{len(resampled)} of {count_text(len(timed), 'clip')} {'is' if len(resampled) == 1 else 'are'} resampled "
            f"to {clips.rate:g} frames a second by time stamps, so that motion keeps its speed: {joined(resampled)}"
        )
    counts = [(name, len(clips.numbers(times))) for name, times in timed]
    most = 0 if config.frames is None else clips.latent.whole_frames(clips.most)
    if short := [(name, count) for name, count in counts if count < most]:
        yield (
            f"{len(short)} of {count_text(len(counts), 'clip')} {'has' if len(short) == 1 else 'have'} fewer than "
            f"{clips.most} frames at {clips.rate:g} a second, such as {short[0][0]} with {short[0][1]}, and "
            f"{'is' if len(short) == 1 else 'are'} trained whole; add longer ones, or lower frames"
        )


def token_counter(model: Model) -> tuple[Callable[[str], int] | None, TokenLimit | None]:
    """How the model counts the tokens of a caption, None without a text encoder; and its limit, None if it has none.

    Of several encoders the one that reads the longest captions counts.
    """
    slots = {name: ENCODERS[slot.kind] for name, slot in model.family.text_encoders.items()}
    present = [name for name in slots if name in model.components.tokenizers]
    if not present:
        return None, None
    widest = max(present, key=lambda name: slots[name].longest or math.inf)
    tokenizer = model.components.tokenizers[widest]

    @cache
    def count(caption: str) -> int:
        return len(tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])

    title = model.family.title
    if (most := model.family.most_tokens(model.components.denoiser)) is not None:
        return count, TokenLimit(title, most, cuts=True)
    longest = slots[widest].longest
    return count, None if longest is None else TokenLimit(f"the text encoder of {title}", longest)


def plain(check: DataCheck) -> dict[str, Any]:
    """The check as JSON values."""
    preflight = check.preflight
    return {
        "folder": str(preflight.folder),
        "model": check.model,
        "resolutions": preflight.resolutions,
        "is_size_assumed": check.is_size_assumed,
        "multiple": preflight.multiple,
        "is_fine": not preflight.findings,
        "findings": [
            {
                "kind": finding.kind,
                "problem": finding.problem,
                "examples": finding.examples,
                "remedy": finding.remedy,
                "images": [preflight.images[index].name for index in finding.images],
            }
            for finding in preflight.findings
        ],
        "images": [
            {
                "name": image.name,
                "width": image.file.width,
                "height": image.file.height,
                "repeats": image.file.repeats,
                "caption": image.file.caption,
                "tokens": image.tokens,
                "bucket": image.bucket,
                "crop": [round(edge, 2) for edge in image.crop],
                "scale": round(image.scale, 4),
                "blur": None if image.quality.blur is None else round(image.quality.blur, 3),
                "findings": preflight.findings_of(index),
            }
            for index, image in enumerate(preflight.images)
        ],
        "skipped": [{"name": name_in(preflight.folder, path), "reason": reason} for path, reason in preflight.skipped],
        "notes": preflight.notes,
        "buckets": [vars(bucket) for bucket in preflight.buckets],
        "alike": [[preflight.images[index].name for index in group.members] for group in preflight.alike],
        "samples_per_epoch": preflight.epoch.samples,
        "held_out": preflight.epoch.held_out,
        "batch": preflight.epoch.batch,
        "steps_per_epoch": preflight.epoch.steps(1),
    }


_SHOWN, _OTHERS, _GROUPS = 24, 48, 12  # pictures of a finding, pictures without one, groups of look-alikes
_EDGE = 288  # pixels of a picture on the page
_WHOLE = 0.97  # share from which a crop is not drawn
_TAGS, _FILES = 12, 200

_GROUPED: frozenset[FindingKind] = frozenset(("copies", "look-alikes"))
_KINDS: dict[FindingKind, tuple[str, str]] = {
    "unused files": ("Files that cannot be used", ""),
    "empty pictures": ("Pictures that show nothing", "one colour"),
    "tiny pictures": ("Pictures that are far too small", "tiny"),
    "enlarged pictures": ("Pictures that would be enlarged", "small"),
    "blurred pictures": ("Blurred pictures", "blurred"),
    "cut pictures": ("Pictures that lose much to the crop", "cut"),
    "copies": ("Copies", "copy"),
    "look-alikes": ("Nearly identical pictures", "look-alike"),
    "much alike": ("Pictures that are much alike", "much alike"),
    "odd ones out": ("Odd ones out", "something else?"),
    "missing controls": ("Missing controls", "no control"),
    "unchanged pairs": ("Pairs that are the same picture", "same as its control"),
    "swapped pairs": ("Pairs that may be swapped", "swapped?"),
    "other aspects": ("Controls of another aspect ratio", "other aspect"),
    "missing captions": ("Missing captions", ""),
    "empty captions": ("Empty captions", ""),
    "equal captions": ("Equal captions", ""),
    "long captions": ("Captions that are too long", ""),
    "broken captions": ("Captions in JSON that are broken", ""),
    "known trigger": ("A trigger that the model knows", ""),
    "dropped captions": ("Captions that are dropped", ""),
    "shared tags": ("Tags and phrases that all share", ""),
}
"""Title of each kind, and the mark on its pictures, empty where the caption or no picture is meant."""

TITLES: dict[FindingKind, str] = {kind: title for kind, (title, _) in _KINDS.items()}

_REMARKS: dict[FindingKind, str] = {
    "empty captions": "its caption file is empty",
    "equal captions": "others have this caption too",
}


def write_data_page(check: DataCheck, target: Path, config: DataConfig, *, model: str | None = None) -> None:
    """Write the page; OutputError if that fails. `model` is as on the command line, for the command that trains."""
    write_atomic(target, data_page(data_report(check, config, model=model)))


def data_report(check: DataCheck, config: DataConfig, *, model: str | None = None) -> DataReport:
    """The content of the page; see `write_data_page`."""
    preflight = check.preflight
    count = len(preflight.findings)
    clean = [index for index in range(len(preflight.images)) if not preflight.findings_of(index)]
    shown = {index for finding in preflight.findings for index in finding.images[:_SHOWN]} | set(clean[:_OTHERS])
    shown |= {index for group in preflight.alike[:_GROUPS] for index in group.members[:_SHOWN]}
    pictures = _pictures(preflight, sorted(shown))

    def shots(indices: Sequence[int], *, kept: int | None = None) -> list[PictureCard]:
        return [
            _shot(preflight, index, pictures[index], is_kept=index == kept) for index in indices if index in pictures
        ]

    def trouble(finding: Finding) -> Trouble:
        groups, more = _groups(preflight, finding)
        is_grouped = finding.kind in _GROUPED
        return Trouble(
            title=TITLES[finding.kind],
            problem=finding.problem,
            remedy=finding.remedy,
            groups=[shots(group, kept=group[0] if is_grouped else None) for group in groups],
            is_grouped=is_grouped,
            more=more,
            files=[(name_in(preflight.folder, path), reason) for path, reason in preflight.skipped[:_FILES]]
            if finding.kind == "unused files"
            else (),
        )

    return DataReport(
        title=preflight.folder.resolve().name,
        status="Nothing to look at" if not count else f"{count_text(count, 'thing')} to look at",
        mood="fair" if count else "good",
        verdict=_verdict(preflight, clean),
        summary=_summary(check),
        facts=_facts(preflight),
        troubles=[trouble(finding) for finding in preflight.findings],
        commands=_commands(preflight, config, model),
        sizes=[SizeRow(bucket.width, bucket.height, bucket.images, bucket.samples) for bucket in preflight.buckets],
        sizes_are=_sizes(check),
        steps=step_lines(preflight),
        captions=_captions(preflight),
        others=shots(clean[:_OTHERS]),
        others_more=max(0, len(clean) - _OTHERS),
        notes=preflight.notes,
    )


def said_of(preflight: Preflight, index: int) -> tuple[list[str], list[str]]:
    """What is wrong with a picture, in a word or two each, and with its caption."""
    image, kinds = preflight.images[index], preflight.findings_of(index)
    remarks = [_REMARKS[kind] for kind in kinds if kind in _REMARKS]
    if "long captions" in kinds and preflight.limit is not None:
        remarks.append(f"{image.tokens:,} tokens of {preflight.limit.longest}")
    if image.json_fault:
        remarks.append(f"its JSON: {image.json_fault}")
    return [_mark(image, kind) for kind in kinds if _KINDS[kind][1]], remarks


def step_lines(preflight: Preflight) -> dict[str, str]:
    """Lines about the epoch, steps and held-out images, by title."""
    epoch = preflight.epoch
    images, total = len(preflight.images), epoch.samples + epoch.held_out_samples
    counted = count_text(images, "image") + (f", {total:,} with repeats" if total != images else "")
    held = len(epoch.held_out)
    lines = {"An epoch": f"{count_text(epoch.samples, 'sample')} ({counted}{f', {held:,} held out' if held else ''})"}
    lines["Steps"] = ", ".join(f"{epoch.steps(epochs):,} for {count_text(epochs, 'epoch')}" for epochs in (1, 10, 50))
    lines["Steps"] += f" with batch {epoch.batch}"
    if held:
        names = ", ".join(epoch.held_out[:8]) + (f" and {held - 8:,} more" if held > 8 else "")
        lines["Held out"] = f"{names}, to validate"
    return lines


def _pictures(preflight: Preflight, indices: Sequence[int]) -> dict[int, list[tuple[str, int, int] | None]]:
    """Small versions of images, and of their controls in a row, as data URIs with their sizes; None for those that can
    no longer be read, or that have no controls.
    """

    def read(index: int) -> list[tuple[str, int, int] | None]:
        image = preflight.images[index].file
        return [_small([image.path]), _small([control.path for control in image.controls])]

    with ThreadPoolExecutor(thread_name_prefix="read pictures") as pool:
        return dict(zip(indices, pool.map(read, indices), strict=True))


def _small(paths: Sequence[Path]) -> tuple[str, int, int] | None:
    try:
        return picture_uri(side_by_side([open_still(path, _EDGE) for path in paths])) if paths else None
    except ImageError:
        return None


def _groups(preflight: Preflight, finding: Finding) -> tuple[list[tuple[int, ...]], int]:
    """The groups of pictures to show of a finding, and the number of pictures left out."""
    if finding.kind not in _GROUPED:
        return ([finding.images[:_SHOWN]] if finding.images else []), max(0, len(finding.images) - _SHOWN)
    named = set(finding.images)
    groups = [
        (group.best, *(index for index in group.others if index in named))
        for group in preflight.alike
        if named & set(group.others)
    ]
    shown = [group[:_SHOWN] for group in groups[:_GROUPS]]
    return shown, sum(map(len, groups)) - sum(map(len, shown))


def _shot(
    preflight: Preflight, index: int, pictures: Sequence[tuple[str, int, int] | None], *, is_kept: bool = False
) -> PictureCard:
    image = preflight.images[index]
    marks, remarks = said_of(preflight, index)
    width, height = image.file.width, image.file.height
    left, top, right, bottom = image.crop
    crop = None if image.kept >= _WHOLE else (left / width, top / height, right / width, bottom / height)
    return PictureCard(
        name=image.name,
        about=f"{image.size} → {image.bucket[0]}×{image.bucket[1]}",
        caption=image.file.caption,
        marks=marks,
        is_kept=is_kept,
        remarks=remarks,
        crop=crop,
        picture=pictures[0],
        controls=pictures[1],
    )


def _mark(image: CheckedImage, kind: FindingKind) -> str:
    if kind in ("tiny pictures", "enlarged pictures"):
        return f"{_KINDS[kind][1]}, enlarged {image.scale:.1f}×"
    if kind == "cut pictures":
        return f"{100 * (1 - image.kept):.0f} % cut off"
    return _KINDS[kind][1]


def _verdict(preflight: Preflight, clean: Sequence[int]) -> str:
    images = len(preflight.images)
    if not preflight.findings:
        return f"{'The image is' if images == 1 else f'All {images:,} images are'} fit for training."
    return f"{len(clean):,} of {images:,} images are fit for training as they are."


def _summary(check: DataCheck) -> str:
    found = check.preflight
    sides = " and ".join(f"{side}×{side}" for side in found.resolutions)
    sizes = f"{sides} pixels" + (", assumed" if check.is_size_assumed else "")
    return " · ".join(filter(None, (check.model, sizes, str(found.folder.resolve()))))


def _facts(preflight: Preflight) -> dict[str, str]:
    facts = {"images": f"{len(preflight.images):,}"}
    if preflight.skipped:
        facts["not used"] = f"{len(preflight.skipped):,}"
    facts |= {
        "with a caption": f"{preflight.captioned:,}",
        **({"with a control": f"{preflight.paired:,}"} if preflight.paired else {}),
        "samples in an epoch": f"{preflight.epoch.samples:,}",
        "held out": f"{len(preflight.epoch.held_out):,}",
        "sizes in training": f"{len(preflight.buckets):,}",
    }
    return facts


def _commands(preflight: Preflight, config: DataConfig, model: str | None) -> dict[str, str]:
    folder = preflight.folder.resolve()
    chosen = [*(["--trigger", config.trigger] if config.trigger else [])]
    chosen += ["--resolution", str(config.resolution)] if config.resolution else []
    chosen += arguments_for({"control": [Path(place).resolve() for place in config.control]})
    chosen += ["--controls", config.controls] if config.controls != "required" else []
    named = ["--model", model] if model else []
    commands = {}
    if any(finding.kind in ("unused files", "copies", "look-alikes") for finding in preflight.findings):
        target = folder.with_name(f"{folder.name}-mended")
        arguments = ["lorasmith", "data", "check", positional(folder), *named, *chosen, "--fix", target]
        commands["Write a new folder in which copies are set apart and files converted"] = command_line(arguments)
    commands["Train on it"] = command_line(
        ["lorasmith", "train", positional(folder), *(named or ["--model", "MODEL"]), *chosen]
    )
    return commands


def _sizes(check: DataCheck) -> str:
    preflight = check.preflight
    side = preflight.resolutions[0]
    why = (
        "Neither a model nor a resolution was given, so the sizes are those of the largest usual resolution that most "
    )
    sentence = (
        f"Pictures are scaled to about {side}×{side} pixels and cropped to sides that are multiples of "
        f"{preflight.multiple}; the frame in a picture is what is trained."
    )
    more = [f"{resolution}×{resolution}" for resolution in preflight.resolutions[1:]]
    if more:
        sentence += f" They are drawn at {' and '.join(more)} as well."
    return f"{why}images fill. {sentence}" if check.is_size_assumed else sentence


def _captions(preflight: Preflight) -> dict[str, str]:
    written = [image for image in preflight.images if image.is_captioned]
    lines = {"Written": f"{len(written):,} of {len(preflight.images):,} images have a caption of their own"}
    if preflight.trigger:
        lines["Trigger"] = preflight.trigger
    lengths = sorted(image.tokens for image in preflight.images if image.tokens is not None)
    if lengths:
        middle = lengths[len(lengths) // 2]
        limit = "" if preflight.limit is None else f", of at most {preflight.limit.longest:,} {preflight.limit.rule}"
        lines["Length"] = f"{lengths[0]:,} to {lengths[-1]:,} tokens, {middle:,} in the middle{limit}"
    tags = Counter(tag for image in written for tag in dict.fromkeys(tags_of(image.file.caption)))
    if frequent := [(tag, count) for tag, count in tags.most_common(_TAGS) if count > 1]:
        lines["Frequent tags"] = ", ".join(f"{tag} × {count:,}" for tag, count in frequent)
    return lines
