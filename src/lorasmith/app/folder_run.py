"""A run on a folder of images: read, planned, encoded, trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorasmith.app.command_lines import arguments_for
from lorasmith.app.model_run import run_folder, train_job
from lorasmith.app.run_plan import ImageEncoded, ImagesFound, ModelLoading, RunPlan, RunPlanned
from lorasmith.core.errors import OptionError
from lorasmith.core.options import config_from, options_of
from lorasmith.core.placement import chosen_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import encode_scan
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import EventHandler
from lorasmith.training.job import Job, plan_job
from lorasmith.training.train import RunOptions, TrainResult

__all__ = ["FolderSource", "PreparedRun", "prepare", "repeated", "train_prepared"]

RUNS = Path("runs")
"""Where runs are that nobody chose a folder for."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """How a run on a folder was asked for, besides its settings; `run.json` and the LoRA keep it to repeat the run.

    Attributes:
        folder: of the images, absolute.
        model: base model: a path, absolute, a hub id or a built-in name.
        name: of the LoRA.
        trigger: phrase put in front of captions that lack it.
        resolution: side in pixels of the square whose area pictures are scaled to; None for the model's own.
        validation: folder of images to judge the LoRA by, absolute.
        device: where to train; None for the first GPU, or the CPU.
        argv: the command that asks for the same run from anywhere.
    """

    folder: str
    model: str
    name: str
    trigger: str = ""
    resolution: int | None = None
    validation: str | None = None
    device: str | None = None
    argv: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        folder: Path,
        model: str,
        config: TrainConfig,
        *,
        name: str | None = None,
        trigger: str = "",
        resolution: int | None = None,
        validation: Path | None = None,
        device: str | None = None,
    ) -> FolderSource:
        """The source with its paths absolute, and the command for it and `config`. Arguments as the attributes; the
        name is the folder's if left out."""
        own: dict[str, Any] = {
            "model": absolute(model),
            "name": name,
            "trigger": trigger,
            "resolution": resolution,
            "validation": validation and str(validation.resolve()),
            "device": device,
        }
        chosen = {one: getattr(config, one) for one in options_of(TrainConfig) if not config.is_default(one)}
        given = {option: value for option, value in own.items() if value} | chosen
        argv = ("lorasmith", "train", str(folder.resolve()), *arguments_for(given))
        return cls(**{**own, "name": name or folder.resolve().name}, folder=str(folder.resolve()), argv=argv)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FolderSource:
        """The source that a record holds. Raises TypeError if it lacks folder, model or name."""
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})

    def to_record(self) -> dict[str, Any]:
        """What `run.json` keeps."""
        return {"command": "train", **asdict(self)}


@dataclass(frozen=True)
class PreparedRun:
    """A run that can begin.

    Attributes:
        source: how it was asked for.
        plan: what it will do.
        base: the model.
        job: what is trained.
        data, validation: on what, and judged by what, if not by a share of it.
    """

    source: FolderSource
    plan: RunPlan
    base: Model
    job: Job
    data: EncodedDataset
    validation: EncodedDataset | None


def prepare(source: FolderSource, config: TrainConfig, *, on_event: EventHandler = lambda event: None) -> PreparedRun:
    """Read the images, load the model, decide what is trained, and encode.

    Args:
        source: images, model and the like.
        config: settings, some of them open.
        on_event: receives `ImagesFound`, `ModelLoading`, `RunPlanned` and an `ImageEncoded` for each image.

    Raises:
        LorasmithError: images, model, settings or device cannot be used.
    """
    if re.search(r"[/\\]|^\.*$", source.name):
        raise OptionError(f"name must be that of a file, without folders, got {source.name!r}; --output is for those")
    device = chosen_device(source.device)
    folder = Path(source.folder)
    scan = scan_folder(folder, trigger=source.trigger)
    on_event(ImagesFound(folder=folder, scan=scan, trigger=source.trigger))
    judged = None if source.validation is None else scan_folder(Path(source.validation), trigger=source.trigger)
    on_event(ModelLoading(model=source.model))
    base = load_model(source.model)
    job = plan_job(base.denoiser, config, device)
    plan = _plan(source, scan, base, job)
    on_event(RunPlanned(plan=plan))

    def encoded(found: FolderScan, progress: Callable[[int, int, str], None] | None) -> EncodedDataset:
        return encode_scan(found, base, resolution=source.resolution, device=device, progress=progress)

    data = encoded(scan, lambda done, total, name: on_event(ImageEncoded(done=done, total=total)))
    return PreparedRun(source, plan, base, job, data, None if judged is None else encoded(judged, None))


def train_prepared(
    prepared: PreparedRun,
    *,
    output: Path | Callable[[Mapping[str, Any]], Path] | None = None,
    fresh: bool = False,
    until: int | None = None,
    on_event: EventHandler = RunOptions.on_event,
    cancelled: Callable[[], bool] = RunOptions.cancelled,
) -> TrainResult:
    """Train.

    Args:
        prepared: what.
        output: folder of the run, or what chooses it by the run's fingerprint; left out, the folder under `runs/` that
            holds this run unfinished, or a new one.
        fresh: do not continue an unfinished run.
        until: step behind which it ends; None for the last.
        on_event: receives training's events.
        cancelled: called between steps; True ends the run with what there is.

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
        on_event=on_event,
        cancelled=cancelled,
        until=until,
    )
    return train_job(prepared.base.denoiser, prepared.job, prepared.data, options)


def repeated(
    run: Mapping[str, Any], *, model: str | None, data: Path | None, device: str | None
) -> tuple[FolderSource, TrainConfig]:
    """Source and settings of a run that was made before, to prepare it again.

    Args:
        run: `run.json`, or what a LoRA says of the run that made it.
        model, data, device: base model, folder of images and device where they are not the run's.
    """
    now = {"model": model and absolute(model), "folder": data and str(data.resolve()), "device": device}
    source = FolderSource.from_record({**run["source"], **{name: value for name, value in now.items() if value}})
    # `auto` may be another format here, and this is to be the same run.
    dtype = run["fingerprint"]["config"]["training_dtype"]
    return source, config_from(TrainConfig, {**run["asked"], "training_dtype": dtype})


def absolute(path: str) -> str:
    """A path that is valid from any folder; what is no path, such as a hub id, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _plan(source: FolderSource, scan: FolderScan, base: Model, job: Job) -> RunPlan:
    return RunPlan(
        folder=Path(source.folder),
        scan=scan,
        trigger=source.trigger,
        model=base.title,
        family=base.family.title,
        resolution=source.resolution or base.defaults.resolution,
        pixel_multiple=base.defaults.pixel_multiple,
        trained=job.summary,
        parameters=job.parameters,
        config=job.config,
        notes=job.notes,
    )
