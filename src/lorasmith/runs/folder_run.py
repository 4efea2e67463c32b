"""A run on a folder of images: scan, plan, encode, train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.core.files import check_writable
from lorasmith.core.folders import Folders
from lorasmith.core.options import changed
from lorasmith.core.placement import chosen_device
from lorasmith.core.processes import current
from lorasmith.data.crops import pixel_step
from lorasmith.data.data_config import ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import clip_form, datasets_folder, encode_scan
from lorasmith.data.folder import FolderScan, has_videos, scan_sources
from lorasmith.data.picture_encoding import EncodingProgress
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.runs.class_images import class_scan
from lorasmith.runs.data_check import check_scan
from lorasmith.runs.model_run import run_folder, train_job
from lorasmith.runs.run_images import image_facts, keep_thumbnails
from lorasmith.runs.run_plan import (
    EncodersHashed,
    ImageEncoded,
    ImagesChecked,
    ImagesFound,
    ModelLoading,
    RunPlan,
    RunPlanned,
)
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.previews import Partner
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import CaptionEncoded, EventHandler, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.joint import EngineMaker
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.records import check_title
from lorasmith.training.storage.run_folder import RunFolder, check_room, output_folder
from lorasmith.training.train import RunOptions, run_bytes

_SHOWN = ("trigger", "resolution", "more_resolutions", "bucket_step")
"""Settings of the data that a plan has in other words."""

RUNS = Path("runs")  # default parent folder of runs


@dataclass(frozen=True)
class PreparedRun:
    """A run ready to start."""

    spec: RunSpec  # with the files of all parts of the model
    plan: RunPlan
    base: Model
    job: Job
    data: EncodedDataset
    validation: EncodedDataset | None  # held-out samples; None to hold out a share of `data`
    claim: RunFolder | None = None  # folder of the run, claimed until it is trained; None if it is chosen then


def prepare(
    spec: RunSpec,
    *,
    output: Path | None = None,
    runs: Path | None = None,
    folders: Folders | None = None,
    on_event: EventHandler = lambda event: None,
    cancelled: Callable[[], bool] = lambda: False,
    load: Callable[[ModelFiles, Folders | None], Completed] = load_completed,
    configured: Callable[[TrainConfig, Model], TrainConfig] = lambda config, base: config,
    samples: tuple[EncodedDataset, EncodedDataset | None] | None = None,
) -> PreparedRun:
    """Scan the images, load the model (first, if there are videos), plan the run, and encode.

    `output`, the folder of the run or one that it is in under its name, is claimed before anything is loaded; without
    one, `runs` is tried, in which the folder is chosen when training begins. `samples` are training and held-out
    samples that the same encoders made of these images, which are then not encoded. `configured` adds to the settings
    what the model decides. Events are those of `run_plan`, `CaptionEncoded`, and a `Warned` for each damaged file among
    `folders`; `cancelled` is called while pictures of the class are drawn.
    """
    spec = spec.resolved()
    check_title(spec.name)
    processes = current()
    claim = None if output is None else RunFolder(output_folder(output, spec.name))
    place = runs if claim is None else claim.path
    with contextlib.ExitStack() as undo:
        if claim is not None:
            undo.callback(claim.release)
            processes.broadcast_from_rank0(claim.claim)
        elif runs is not None:
            processes.broadcast_from_rank0(lambda: check_writable(runs))
        device, settings, config = chosen_device(spec.device), spec.data, spec.config
        folder = Path(spec.folder)

        def load_model() -> Completed:
            on_event(ModelLoading(model=spec.model))
            found = load(spec.files, folders)
            for note in found.notes:
                on_event(Warned(message=note))
            return found

        judged_sources = () if spec.validation is None else (ImageSource(spec.validation),)
        # A model of pictures has videos left out, unread; otherwise images are checked before the model takes its time.
        videos = has_videos((*spec.sources, *judged_sources), settings, cache=datasets_folder())
        loaded = load_model() if videos else None
        clips = loaded is None or clip_form(loaded.model, settings) is not None
        scan = scan_sources(spec.sources, settings, cache=datasets_folder(), clips=clips)
        on_event(ImagesFound(folder=folder, scan=scan, trigger=settings.trigger))
        judged = scan_sources(judged_sources, settings, clips=clips) if judged_sources else None
        loaded = loaded or load_model()
        base = loaded.model
        base.family.check_parts(base.components, text=True, images=True)
        if clip_form(base, settings) is None:
            scan, judged = scan.of_pictures(), judged and judged.of_pictures()
        if loaded.files != spec.files:
            spec = spec.with_files(loaded.files)
        config = configured(config, base)
        job = plan_job(base.denoiser, config, device)
        if place is not None:
            processes.broadcast_from_rank0(lambda: check_room(place, run_bytes(job)))
        check = check_scan(
            scan,
            settings,
            folder=folder,
            model=base,
            batch=config.samples_per_step,
            validation_share=config.validation_share if judged is None else 0.0,
        )
        on_event(ImagesChecked(check=check))
        with processes.rank0_first():
            prior = class_scan(settings, base, device=device, on_event=on_event, cancelled=cancelled)
        if prior is not None:
            scan = replace(scan, images=(*scan.images, *prior.images))
        plan = _plan(spec, scan, loaded, job, check.preflight.epoch.held_out)
        on_event(RunPlanned(plan=plan))

        if samples is not None:
            undo.pop_all()
            return PreparedRun(spec, plan, base, job, *samples, claim)

        def encoded(found: FolderScan, progress: EncodingProgress | None) -> EncodedDataset:
            return encode_scan(
                found,
                base,
                settings,
                device=device,
                progress=progress,
                caption_progress=lambda done, total: on_event(CaptionEncoded(done=done, total=total)),
                hash_progress=lambda done, total: on_event(EncodersHashed(done=done, total=total)),
            )

        def tell(done: int, total: int, name: str, cached: int) -> None:
            on_event(ImageEncoded(done=done, total=total, cached=cached))

        data = encoded(scan, tell)
        judged_data = None if judged is None else encoded(judged, None)
        undo.pop_all()
        return PreparedRun(spec, plan, base, job, data, judged_data, claim)


def train_prepared(
    prepared: PreparedRun,
    *,
    output: Path | Callable[[Fingerprint], Path] | None = None,
    fresh: bool = False,
    verify: bool = False,
    until: int | None = None,
    on_event: EventHandler = RunOptions.on_event,
    cancelled: Callable[[], bool] = RunOptions.cancelled,
    partner: Partner | None = None,
    engine: EngineMaker = RunOptions.engine,
) -> TrainResult:
    """Train a prepared run, with previews of its prompt where its settings have None.

    Without an `output` the folder is the one under `runs/` that holds this run unfinished, or a new one; with `fresh`
    no run is continued. `verify` compares and records every byte of the base model's files. `until` is the step after
    which the run ends. Errors are those of `model_run.train`.
    """
    spec = prepared.spec
    options = RunOptions(
        output=output or run_folder(RUNS, spec.name, fresh=fresh),
        claim=prepared.claim,
        fresh=fresh,
        title=spec.name,
        trigger=spec.data.trigger or None,
        validation=prepared.validation,
        source=spec.to_record(),
        facts=image_facts(prepared.plan),
        begun=lambda folder: keep_thumbnails(folder, prepared.plan),
        verify=verify,
        on_event=on_event,
        cancelled=cancelled,
        until=until,
        engine=engine,
    )
    prompt = prepared.plan.prompt
    return train_job(prepared.base.denoiser, prepared.job, prepared.data, options, unasked=prompt, partner=partner)


def _plan(spec: RunSpec, scan: FolderScan, loaded: Completed, job: Job, held_out: tuple[str, ...]) -> RunPlan:
    base = loaded.model
    return RunPlan(
        folder=Path(spec.folder),
        scan=scan,
        trigger=spec.data.trigger,
        model=base.title,
        family=base.family.title,
        found=loaded.found,
        resolutions=spec.data.all_resolutions(base.defaults.resolution),
        pixel_multiple=pixel_step(spec.data, base.defaults.pixel_multiple),
        data={name: one for name, one in changed(spec.data).items() if name not in _SHOWN},
        trained=job.summary,
        parameters=job.parameters,
        config=job.config,
        notes=job.notes,
        held_out=held_out,
    )
