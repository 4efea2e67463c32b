"""Planning a run on folders of images: scan, load the model, decide the job, check, encode."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.core.files import check_writable
from lorasmith.core.options import changed
from lorasmith.core.placement import chosen_device
from lorasmith.core.processes import current
from lorasmith.data.clips import clip_form
from lorasmith.data.controls import check_controls
from lorasmith.data.crops import pixel_step
from lorasmith.data.data_config import ImageSource
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import datasets_folder, encode_scan
from lorasmith.data.fetched_folder import local_sources
from lorasmith.data.folder import FolderScan, has_videos, scan_sources
from lorasmith.data.picture_encoding import EncodingProgress
from lorasmith.families.model import Denoiser
from lorasmith.families.model_search import Completed
from lorasmith.runs.class_images import class_scan
from lorasmith.runs.data_check import check_scan
from lorasmith.runs.presets import model_name, with_recipe
from lorasmith.runs.run import Host
from lorasmith.runs.run_images import image_facts
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
from lorasmith.training.events import CaptionEncoded, Warned
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.storage.records import check_title
from lorasmith.training.storage.run_folder import RunFolder, check_room, output_folder
from lorasmith.training.train import Plan, run_bytes

_SHOWN = ("trigger", "resolution", "more_resolutions", "bucket_step")
"""Settings of the data that a plan has in other words."""


@dataclass(frozen=True, kw_only=True)
class FolderPlan(Plan):
    """A run on folders of images, ready to start."""

    denoiser: Denoiser
    spec: RunSpec  # with the files of all parts of the model
    summary: RunPlan


def plan(spec: RunSpec, host: Host) -> FolderPlan:
    """Scan the images, load the model (first, if there are videos), decide the job, check, and encode.

    The spec's `output`, the folder of the run or one that it is in under its name, is claimed before anything is
    loaded; without one, the host's `runs` is tried, in which the folder is chosen when training begins. Events are
    those of `run_plan`, `CaptionEncoded`, and a `Warned` for each damaged file among the host's folders.
    """
    spec = spec.resolved()
    check_title(spec.name)
    processes, runs = current(), host.runs
    output = None if spec.output is None else Path(spec.output)
    claim = None if output is None else RunFolder(output_folder(output, spec.name))
    place = runs if claim is None else claim.path
    with contextlib.ExitStack() as undo:
        if claim is not None:
            undo.callback(claim.release)
            processes.broadcast_from_rank0(claim.claim)
        elif runs is not None:
            processes.broadcast_from_rank0(lambda: check_writable(runs))
        device, settings = chosen_device(spec.device), spec.data
        sources = local_sources(spec.sources, settings, datasets_folder())
        folder = Path(sources[0].path)

        def load_model() -> Completed:
            host.on_event(ModelLoading(model=spec.model))
            found = host.load(spec.files, host.folders)
            for note in found.notes:
                host.on_event(Warned(message=note))
            return found

        named = () if spec.validation is None else (ImageSource(spec.validation),)
        judged_sources = local_sources(named, settings, datasets_folder())
        # A model of pictures has videos left out, unread; otherwise images are checked before the model takes its time.
        videos = has_videos((*sources, *judged_sources), settings, cache=datasets_folder())
        loaded = load_model() if videos else None
        clips = loaded is None or clip_form(loaded.model, settings) is not None
        scan = scan_sources(sources, settings, cache=datasets_folder(), clips=clips)
        host.on_event(ImagesFound(folder=folder, scan=scan, trigger=settings.trigger))
        judged = scan_sources(judged_sources, settings, clips=clips) if judged_sources else None
        loaded = loaded or load_model()
        base = loaded.model
        base.family.check_parts(base.components, text=True, images=True, form=base.control_form)
        if clip_form(base, settings) is None:
            scan, judged = scan.of_pictures(), judged and judged.of_pictures()
        if loaded.files != spec.files:
            spec = spec.with_files(loaded.files)
        for images in filter(None, (scan, judged)):
            check_controls(images, settings, base)
        captions = [image.caption for image in scan.images]
        spec, recipe = with_recipe(spec, captions, model=model_name(base.path, base.family.name))
        if spec.data != settings:  # sources are scanned again: captions and controls are settings of data
            settings = spec.data
            scan = scan_sources(sources, settings, cache=datasets_folder(), clips=clips)
            scan = scan if clip_form(base, settings) is not None else scan.of_pictures()
        config = host.configured(spec.config, base)
        job = plan_job(base.denoiser, config, device, folders=host.folders)
        if recipe is not None:
            job = replace(job, notes=(recipe.sentence, *job.notes))
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
        host.on_event(ImagesChecked(check=check))
        with processes.rank0_first():
            prior = class_scan(settings, base, device=device, host=host)
        if prior is not None:
            scan = replace(scan, images=(*scan.images, *prior.images))
        summary = _summary(spec, scan, loaded, job, check.preflight.epoch.held_out)
        host.on_event(RunPlanned(plan=summary))

        def encoded(images: FolderScan, progress: EncodingProgress | None) -> EncodedDataset:
            return encode_scan(
                images,
                base,
                settings,
                device=device,
                progress=progress,
                caption_progress=lambda done, total: host.on_event(CaptionEncoded(done=done, total=total)),
                hash_progress=lambda done, total: host.on_event(EncodersHashed(done=done, total=total)),
            )

        def on_image(done: int, total: int, name: str, cached: int) -> None:
            host.on_event(ImageEncoded(done=done, total=total, cached=cached))

        data, validation = host.samples(spec) or (
            encoded(scan, on_image),
            None if judged is None else encoded(judged, None),
        )
        undo.pop_all()
        return FolderPlan(
            spec=spec,
            summary=summary,
            denoiser=base.denoiser,
            job=job,
            data=data,
            validation=validation,
            title=spec.name,
            trigger=settings.trigger or None,
            prompt=summary.prompt,
            images=scan.images,
            source=spec.to_record(),
            facts=image_facts(summary),
            output=output,
            claim=claim,
        )


def _summary(spec: RunSpec, scan: FolderScan, loaded: Completed, job: TrainJob, held_out: tuple[str, ...]) -> RunPlan:
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
        data={name: value for name, value in changed(spec.data).items() if name not in _SHOWN},
        trained=job.summary,
        parameters=job.parameters,
        config=job.config,
        notes=job.notes,
        held_out=held_out,
    )
