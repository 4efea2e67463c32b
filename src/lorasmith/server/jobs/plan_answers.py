"""Questions about a run before it starts: its plan, and the devices of this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.placement import drives_display
from lorasmith.core.printable import count_text, memory_text
from lorasmith.core.processor import busy_processors, slowdown_beside
from lorasmith.data.controls import check_controls
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.preflight import epoch_of
from lorasmith.families.loading import load_structure
from lorasmith.families.locating import (
    BUILT_IN,
    MODEL_FOLDERS,
    ModelFiles,
    named_path,
)
from lorasmith.families.model import Model, training_adapter_in
from lorasmith.families.model_search import in_folders
from lorasmith.runs.memory_estimate import DESKTOP_BYTES, MemoryEstimate, estimate_memory
from lorasmith.runs.presets import model_name, run_s, with_recipe
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.time_estimate import STEP_WORK, rates_of, work_of
from lorasmith.server.jobs.job_shapes import PlanAnswer
from lorasmith.server.models.model_answers import HashableFolders
from lorasmith.server.questions import question
from lorasmith.training.config import TrainConfig
from lorasmith.training.notes import on_distilled
from lorasmith.training.trainable import TrainableDenoiser

_ENDLESS = 2**50
_FEW, _MANY_EPOCHS = 5, 300


@question
def plan(folders: Folders, spec: RunSpec, *, card_bytes: int | None = None, device: str | None = None) -> PlanAnswer:
    """The plan of a run, without loading weights, on a `device`. `card_bytes` is its memory, None if unknown. Raises
    LorasmithErrors for images, model or settings.
    """
    spec = spec.requested(folders)
    files = ModelFiles(spec.model, edit=spec.edit)
    scan = _checked_scan(folders, files, folders.base / spec.folder, spec.data)
    model = structure_of(in_folders(files.model, folders, MODEL_FOLDERS))
    captions = [image.caption for image in scan.images]
    spec, recipe = with_recipe(spec, captions, model=model_name(model.path, model.family.name))
    data, config = spec.data, spec.config
    scanned, batch = scan.images, config.samples_per_step
    epoch = epoch_of(scanned, batch, config.validation_share)
    controls = 0 if data.controls == "opposite" else max((len(image.controls) for image in scanned), default=0)
    estimate = _estimate(folders, files, config, data.resolution, card_bytes, controls)
    proposal = estimate.proposal
    slowdown = slowdown_beside(busy_processors()) if device == "cpu" else 1.0
    distilled, adapter = ("", "") if config.training_adapter else _distilled(folders, files)
    return PlanAnswer(
        steps=config.steps,
        seen=config.steps * batch,
        epochs=round(epoch.epochs(config.steps), 2),
        rank=config.rank,
        resolution=estimate.pixels,
        images=len(scanned),
        held_out=len(epoch.held_out),
        parameters=estimate.parameters,
        memory_bytes=proposal.needed_bytes,
        fits=None if card_bytes is None else estimate.fits,
        memory_settings=proposal.settings,
        slowdown=slowdown,
        estimated_seconds=None if device is None else _seconds(model, config, estimate.pixels, device, slowdown),
        notes=tuple(_notes(estimate, len(scanned), epoch.epochs(config.steps), is_known=card_bytes is not None)),
        teaches=spec.kind if recipe is not None else "",
        teaches_because="" if recipe is None else recipe.because,
        recipe={} if recipe is None else dict(recipe.settings),
        distilled=distilled,
        usual_adapter=adapter,
    )


def _seconds(model: Model, config: TrainConfig, pixels: int, device: str, slowdown: float) -> float | None:
    """About how long a run takes; None where that is unknown."""
    weights = sum(parameter.numel() for parameter in model.components.denoiser.parameters())
    name = model_name(model.path, model.family.name)
    work = STEP_WORK[name] if name == BUILT_IN else work_of(model.family.title, round(weights / 1e6))
    rates = rates_of(device)
    if work is None or rates is None:
        return None
    picture = slowdown * rates.step_s(work.at(pixels))
    return run_s(picture, seen=config.steps * config.samples_per_step, preview_share=config.preview_share)


def _checked_scan(folders: Folders, files: ModelFiles, images: Path, data: DataConfig) -> FolderScan:
    """The scan of a folder, whose controls are checked. Raises DataError if they do not fit the model."""
    read = DataConfig(recursive=data.recursive, follow_links=data.follow_links, controls=data.controls)
    scan = _scanned(str(images), repr(fingerprint(images)), read)
    check_controls(scan, data, structure_of(in_folders(files.model, folders, MODEL_FOLDERS)).as_edit(files.edit))
    return scan


@functools.lru_cache(maxsize=8)
def _scanned(folder: str, state: str, config: DataConfig) -> FolderScan:
    """The scan of a folder, cached by its state."""
    return scan_folder(folder, config)


def structure_of(model: str) -> Model:
    """The model without weights, cached by the state of its file."""
    path = named_path(model)
    return _structure_once(model, repr(fingerprint(path)) if path.exists() else "")


@functools.lru_cache(maxsize=4)
def _structure_once(model: str, state: str) -> Model:
    return load_structure(model)


def _estimate(
    folders: Folders,
    files: ModelFiles,
    config: TrainConfig,
    resolution: int | None,
    card_bytes: int | None,
    controls: int,
) -> MemoryEstimate:
    # These do not change the memory of a step.
    plain = replace(config, steps=500, seed=0, existing_lora=None, training_adapter=None, previews=None)
    path = Path(in_folders(files.model, folders, MODEL_FOLDERS))
    state = repr(fingerprint(path)) if path.exists() else ""
    found = _estimated(HashableFolders(folders), files, plain, resolution, controls, state)
    return replace(found, card_bytes=card_bytes or _ENDLESS)  # only the proposal depends on it


@functools.lru_cache(maxsize=64)
def _estimated(
    folders: HashableFolders, files: ModelFiles, config: TrainConfig, resolution: int | None, controls: int, state: str
) -> MemoryEstimate:
    return estimate_memory(
        files, config, card_bytes=_ENDLESS, resolution=resolution, controls=controls, folders=folders.folders
    )


def _notes(estimate: MemoryEstimate, images: int, epochs: float, *, is_known: bool) -> Sequence[str]:
    notes = [
        f"The model lacks its {part.replace('_', ' ')}, usually the file {file}; put it into models/text_encoders."
        for part, file in estimate.missing.items()
    ]
    card = memory_text(estimate.card_bytes)
    if is_known and not estimate.fits:
        notes.append(
            f"A step needs {memory_text(estimate.proposal.needed_bytes)}, more than {card}; use smaller pictures, a "
            "smaller batch or fewer targets."
        )
    elif is_known and not estimate.encoders_fit:
        notes.append(
            f"The text encoders do not fit into {card} at once, so that a caption takes seconds to encode; their files "
            "in fp8 or GGUF are smaller."
        )
    elif is_known and estimate.proposal.settings:
        named = ", ".join(
            f"{key.replace('_', ' ')} {_said(value)}" for key, value in estimate.proposal.settings.items()
        )
        host = estimate.proposal.host_bytes
        needs = f", which takes {memory_text(host)} of host memory" if host else ""
        notes.append(f"To fit into {card} it should train with {named}{needs}.")
    if images < _FEW:
        notes.append(f"With {count_text(images, 'picture')} the LoRA will overfit to them; add some.")
    if epochs > _MANY_EPOCHS:
        notes.append(f"Each picture is seen {epochs:,.0f} times, which is often too much; take fewer steps.")
    if estimate.model == BUILT_IN:
        notes.append("lorasmith-tiny is a small model to try things out; its pictures are icons of 64 pixels.")
    return notes


def _distilled(folders: Folders, files: ModelFiles) -> tuple[str, str]:
    """What is said of a model that is distilled, and the name of the LoRA to train it with; empty for none."""
    facts = TrainableDenoiser(structure_of(in_folders(files.model, folders, MODEL_FOLDERS)).denoiser).facts
    return on_distilled(facts, None), training_adapter_in(folders, facts.usual_adapter) or ""


def _said(value: object) -> str:
    return "on" if value is True else str(value)


@question
def devices(folders: Folders) -> list[dict[str, Any]]:
    """All GPUs, or else the CPU: `{name, title, memory_bytes}` each, the last without what a desktop is left of a GPU.

    Uses no GPU memory.
    """
    import psutil
    import torch

    # Counted through the driver's library, without creating a context on the device.
    count = torch.cuda.device_count()
    if count:
        return [
            {
                "name": f"cuda:{index}",
                "title": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory
                - (DESKTOP_BYTES if drives_display(index) else 0),
            }
            for index in range(count)
        ]
    return [{"name": "cpu", "title": "CPU", "memory_bytes": psutil.virtual_memory().total}]
