"""A run on a folder of images: scan, plan, encode, train."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorasmith.app.command_lines import arguments_for
from lorasmith.app.model_run import run_folder, train_job
from lorasmith.app.run_plan import ImageEncoded, ImagesFound, ModelLoading, RunPlan, RunPlanned
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import MAX_STEM_BYTES, Folders, file_stem
from lorasmith.core.options import config_from, options_of
from lorasmith.core.placement import chosen_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import encode_scan
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed, ModelFiles, load_completed
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import EventHandler, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.train import RunOptions, TrainResult

__all__ = ["FolderSource", "PreparedRun", "prepare", "repeated", "train_prepared"]

RUNS = Path("runs")
"""Default parent folder of runs."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The inputs of a run on a folder besides its settings, stored in `run.json` and the LoRA to repeat the run.

    Attributes:
        folder: of the images, absolute.
        model: base model: a path, absolute, a hub id or a built-in name.
        name: of the LoRA.
        trigger: phrase put in front of captions that lack it.
        resolution: side in pixels of the square whose area pictures are scaled to; None for the model's own.
        validation: folder of held-out images, absolute.
        device: where to train; None for the first GPU, or the CPU.
        text_encoders, vae: files of the model's parts, absolute.
        argv: arguments of the command that repeats the run from any folder.
    """

    folder: str
    model: str
    name: str
    trigger: str = ""
    resolution: int | None = None
    validation: str | None = None
    device: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
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
        text_encoders: Sequence[str] = (),
        vae: str | None = None,
    ) -> FolderSource:
        """The source with absolute paths, and the command for it and `config`.

        Args:
            folder, model, trigger, resolution, validation, device, text_encoders, vae: as the attributes; paths may be
                relative.
            config: settings, for the command.
            name: of the LoRA; that of the folder if None.
        """
        source = cls(
            folder=str(folder.resolve()),
            model=absolute(model),
            name=name or file_stem(folder.resolve().name),
            trigger=trigger,
            resolution=resolution,
            validation=None if validation is None else str(validation.resolve()),
            device=device,
            text_encoders=tuple(absolute(one) for one in text_encoders),
            vae=vae and absolute(vae),
        )
        return source.commanded(config)

    @property
    def files(self) -> ModelFiles:
        """The files of the model."""
        return ModelFiles(self.model, tuple(self.text_encoders), self.vae)

    def with_files(self, files: ModelFiles) -> FolderSource:
        """The source with other files of the model, made absolute."""
        return replace(
            self,
            model=absolute(files.model),
            text_encoders=tuple(map(absolute, files.text_encoders)),
            vae=files.vae and absolute(files.vae),
        )

    def commanded(self, config: TrainConfig) -> FolderSource:
        """The source with the command for it and `config`."""
        own: dict[str, Any] = {
            "model": self.model,
            "text_encoder": self.text_encoders,
            "vae": self.vae,
            "name": None if self.name == Path(self.folder).name else self.name,
            "trigger": self.trigger,
            "resolution": self.resolution,
            "validation": self.validation,
            "device": self.device,
        }
        chosen = {one: getattr(config, one) for one in options_of(TrainConfig) if not config.is_default(one)}
        given = {option: value for option, value in own.items() if value} | chosen
        return replace(self, argv=("lorasmith", "train", self.folder, *arguments_for(given)))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FolderSource:
        """The source in a record. Raises TypeError if folder, model or name are missing."""
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})

    def to_record(self) -> dict[str, Any]:
        """The source as JSON values, for `run.json`."""
        return {"command": "train", **asdict(self)}


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
    if re.search(r"[/\\]|^\.*$", source.name):
        raise OptionError(f"name must be a file name without folders, got {source.name!r}; use --output for folders")
    if file_stem(source.name) != source.name:
        raise OptionError(
            f"name must have at most {MAX_STEM_BYTES} bytes and no control characters, got {source.name!r}; set --name"
        )
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
        source = source.with_files(loaded.files).commanded(config)
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
    output: Path | Callable[[Mapping[str, Any]], Path] | None = None,
    fresh: bool = False,
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
        on_event=on_event,
        cancelled=cancelled,
        until=until,
    )
    return train_job(prepared.base.denoiser, prepared.job, prepared.data, options)


def repeated(
    run: Mapping[str, Any],
    *,
    model: str | None = None,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
    data: Path | None = None,
    device: str | None = None,
) -> tuple[FolderSource, TrainConfig]:
    """Source and settings of an earlier run, to prepare it again.

    Args:
        run: content of `run.json`, or of a LoRA's metadata.
        model, text_encoders, vae, data, device: files of the base model and its parts, folder of images and device, if
            they replace the run's.
    """
    now = {
        "model": model and absolute(model),
        "text_encoders": tuple(map(absolute, text_encoders)),
        "vae": vae and absolute(vae),
        "folder": data and str(data.resolve()),
        "device": device,
    }
    source = FolderSource.from_record({**run["source"], **{name: value for name, value in now.items() if value}})
    # `auto` may resolve to another format on this device, but the run must be the same.
    dtype = run["fingerprint"]["config"]["training_dtype"]
    return source, config_from(TrainConfig, {**run["asked"], "training_dtype": dtype})


def absolute(path: str) -> str:
    """The absolute path, or the text unchanged if it is not a path, such as a hub id."""
    return str(Path(path).resolve()) if Path(path).exists() else path


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
