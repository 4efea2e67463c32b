"""A folder of images checked before training, with the model's sizes and tokenizer where a model is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorasmith.core.files import is_folder
from lorasmith.core.folders import Folders
from lorasmith.data.data_config import DataConfig
from lorasmith.data.encoding import clip_form
from lorasmith.data.findings import TokenLimit
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.preflight import Preflight, name_in, preflight, usual_resolution
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import load_completed
from lorasmith.families.parts.encoders import ENCODERS

_MULTIPLE = 16  # step of sides where no model decides it: that of most families


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The result of checking a folder."""

    preflight: Preflight
    model: str | None  # title of the model; None without one
    is_size_assumed: bool  # the resolution is guessed from the images


def check_folder(
    folder: Path,
    config: DataConfig,
    *,
    files: ModelFiles | None = None,
    folders: Folders | None = None,
    batch: int = 1,
    validation_share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Scan and check a folder of images or a metadata file; `files` are those of the model, whose weights are not read.

    `folders` are searched for parts that the model lacks, and `progress` receives (images done, all images).
    """
    model = None if files is None else load_completed(files, folders).model
    scan = scan_folder(folder, config, clips=model is None or clip_form(model, config) is not None)
    folder = folder if is_folder(folder) else folder.parent  # a metadata file is beside its images
    return check_scan(
        scan, config, folder=folder, model=model, batch=batch, validation_share=validation_share, progress=progress
    )


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
    found = preflight(
        scan,
        config,
        folder=folder,
        resolution=usual_resolution(scan.images) if model is None else model.defaults.resolution,
        multiple=_MULTIPLE if model is None else model.defaults.pixel_multiple,
        tokenize=tokenize,
        limit=limit,
        batch=batch,
        validation_share=validation_share,
        progress=progress,
    )
    return DataCheck(
        preflight=found,
        model=None if model is None else model.title,
        is_size_assumed=model is None and config.resolution is None,
    )


def token_counter(model: Model) -> tuple[Callable[[str], int], TokenLimit] | tuple[None, None]:
    """How the model counts the tokens of a caption, and its limit; (None, None) without a text encoder.

    Of several encoders the one that reads the longest captions counts.
    """
    slots = {name: ENCODERS[slot.kind] for name, slot in model.family.text_encoders.items()}
    present = [name for name in slots if name in model.components.tokenizers]
    if not present:
        return None, None
    widest = max(present, key=lambda name: slots[name].longest)
    tokenizer = model.components.tokenizers[widest]

    @cache
    def count(caption: str) -> int:
        return len(tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])

    return count, TokenLimit(f"the text encoder of {model.family.title}", slots[widest].longest)


def plain(check: DataCheck) -> dict[str, Any]:
    """The check as JSON values."""
    found = check.preflight
    return {
        "folder": str(found.folder),
        "model": check.model,
        "resolutions": found.resolutions,
        "is_size_assumed": check.is_size_assumed,
        "multiple": found.multiple,
        "is_fine": not found.findings,
        "findings": [
            {
                "kind": one.kind,
                "problem": one.problem,
                "examples": one.examples,
                "remedy": one.remedy,
                "images": [found.images[index].name for index in one.images],
            }
            for one in found.findings
        ],
        "images": [
            {
                "name": one.name,
                "width": one.file.width,
                "height": one.file.height,
                "repeats": one.file.repeats,
                "caption": one.file.caption,
                "tokens": one.tokens,
                "bucket": one.bucket,
                "crop": [round(edge, 2) for edge in one.crop],
                "scale": round(one.scale, 4),
                "blur": None if one.quality.blur is None else round(one.quality.blur, 3),
                "findings": found.findings_of(index),
            }
            for index, one in enumerate(found.images)
        ],
        "skipped": [{"name": name_in(found.folder, path), "reason": reason} for path, reason in found.skipped],
        "notes": found.notes,
        "buckets": [vars(bucket) for bucket in found.buckets],
        "alike": [[found.images[index].name for index in group.members] for group in found.alike],
        "samples_per_epoch": found.epoch.samples,
        "held_out": found.epoch.held_out,
        "batch": found.epoch.batch,
        "steps_per_epoch": found.epoch.steps(1),
    }
