"""A run on a folder of images: scan, plan, encode, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorasmith.app.folder_source import FolderSource
from lorasmith.app.model_run import run_folder, train_job
from lorasmith.app.run_plan import ImageEncoded, ImagesFound, ModelLoading, RunPlan, RunPlanned
from lorasmith.core.folders import Folders
from lorasmith.core.placement import chosen_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import encode_scan
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import EventHandler, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.runs.fingerprint import Fingerprint
from lorasmith.training.train import RunOptions, TrainResult

__all__ = ["PreparedRun", "prepare", "train_prepared"]

RUNS = Path("runs")
"""Default parent folder of runs."""


@dataclass(frozen=True)
class PreparedRun:
    """A run ready to start.

    Attributes:
        source: its inputs.
        plan: summary for display.
        base: the model.
        job: the planned run.
        data: the training samples.
        validation: held-out samples, None to hold out a share of `data`.
    """

    source: FolderSource
    plan: RunPlan
    base: Model
    job: Job
    data: EncodedDataset
    validation: EncodedDataset | None


def prepare(
    source: FolderSource,
    config: TrainConfig,
    *,
    folders: Folders | None = None,
    on_event: EventHandler = lambda event: None,
) -> PreparedRun:
    """Scan the images, load the model, plan the run, and encode.

    Args:
        source: images, model and the like.
        config: settings, some of them open.
        folders: where parts that the model lacks are searched; None to search nothing.
        on_event: receives `ImagesFound`, `ModelLoading`, `RunPlanned`, an `ImageEncoded` per image, and a `Warned` for
            each damaged file among `folders`.

    Returns:
        The run; its source names the files of all parts.

    Raises:
        LorasmithError: images, model, settings or device cannot be used.
    """
    source.check()
    device = chosen_device(source.device)
    folder = Path(source.folder)
    scan = scan_folder(folder, trigger=source.trigger)
    on_event(ImagesFound(folder=folder, scan=scan, trigger=source.trigger))
    judged = None if source.validation is None else scan_folder(Path(source.validation), trigger=source.trigger)
    on_event(ModelLoading(model=source.model))
    loaded = load_completed(source.files, folders)
    for note in loaded.notes:
        on_event(Warned(message=note))
    base = loaded.model
    base.family.check_parts(base.components, text=True, images=True)
    if loaded.files != source.files:
        source = source.with_files(loaded.files)
    job = plan_job(base.denoiser, config, device)
    plan = _plan(source, scan, loaded, job)
    on_event(RunPlanned(plan=plan))

    def encoded(found: FolderScan, progress: Callable[[int, int, str], None] | None) -> EncodedDataset:
        return encode_scan(found, base, resolution=source.resolution, device=device, progress=progress)

    data = encoded(scan, lambda done, total, name: on_event(ImageEncoded(done=done, total=total)))
    return PreparedRun(source, plan, base, job, data, None if judged is None else encoded(judged, None))


def train_prepared(
    prepared: PreparedRun,
    *,
    output: Path | Callable[[Fingerprint], Path] | None = None,
    fresh: bool = False,
    verify: bool = False,
    until: int | None = None,
    on_event: EventHandler = RunOptions.on_event,
    cancelled: Callable[[], bool] = RunOptions.cancelled,
) -> TrainResult:
    """Train a prepared run.

    Args:
        prepared: the run.
        output: folder of the run, or a function from the run's fingerprint to it; None for the folder under `runs/`
            that holds this run unfinished, or a new one.
        fresh: do not continue an unfinished run.
        verify: compare and record every byte of the base model's files.
        until: step after which the run ends; None for all steps.
        on_event: receives training events.
        cancelled: called between steps; True ends the run and saves the result.

    Raises:
        LorasmithError: as `model_run.train`.
    """
    source = prepared.source
    options = RunOptions(
        output=output or run_folder(RUNS, source.name, fresh=fresh),
        fresh=fresh,
        title=source.name,
        trigger=source.trigger or None,
        validation=prepared.validation,
        source=source.to_record(),
        verify=verify,
        on_event=on_event,
        cancelled=cancelled,
        until=until,
    )
    return train_job(prepared.base.denoiser, prepared.job, prepared.data, options)


def _plan(source: FolderSource, scan: FolderScan, loaded: Completed, job: Job) -> RunPlan:
    base = loaded.model
    return RunPlan(
        folder=Path(source.folder),
        scan=scan,
        trigger=source.trigger,
        model=base.title,
        family=base.family.title,
        found=loaded.found,
        resolution=source.resolution or base.defaults.resolution,
        pixel_multiple=base.defaults.pixel_multiple,
        trained=job.summary,
        parameters=job.parameters,
        config=job.config,
        notes=job.notes,
    )
