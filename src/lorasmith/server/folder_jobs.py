"""Jobs that train on folders of images, or measure the cost of settings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.app.folder_run import prepare, train_prepared
from lorasmith.app.model_run import run_folder
from lorasmith.app.run_spec import RunSpec
from lorasmith.bench.benchmark import latent_side, measured
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.errors import CancelledError, LorasmithError, OptionError, OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import Folders
from lorasmith.core.sizes import count_text
from lorasmith.core.typed_json import typed
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model_search import Completed
from lorasmith.server.job_reporter import JobReporter, event_json
from lorasmith.server.measurements import measurement_subject
from lorasmith.training.events import Event, Validated
from lorasmith.training.job import plan_job
from lorasmith.training.outcome import Outcome
from lorasmith.training.results import TrainResult
from lorasmith.training.runs.fingerprint import Fingerprint, differences
from lorasmith.training.runs.history import read_history
from lorasmith.training.runs.run_folder import RunFolder
from lorasmith.training.verdict import UNJUDGED

_STEPS = 8  # timed steps of a measurement

Load = Callable[[ModelFiles, Folders | None], Completed]


def train(
    request: Mapping[str, Any],
    folders: Folders,
    *,
    before: Path | None,
    reporter: JobReporter,
    cancelled: Callable[[], bool],
    load: Load,
) -> dict[str, Any]:
    """Train on folders of images, in a run folder below `runs/` of the base folder. `request` is a `RunSpec` as JSON
    with paths relative to the base folder; as in files, import paths of optimizers are refused and trackers are not
    started. `before` is the run folder of an earlier attempt. Raises CancelledError, with the run saved if it has
    begun, and as `prepare` and `train_prepared`.
    """
    if before is not None and RunFolder(before).is_done:  # it completed, but the server did not receive its end
        return {"outputs": _found_before(before)}
    given = _typed(request)
    if given.low_noise_model is not None:
        raise OptionError(
            f"a job trains one model, got low_noise_model {given.low_noise_model}; send a job for each expert, or run "
            "lorasmith train --low-noise-model"
        )
    # Each worker sees a single GPU.
    spec = replace(given.trusted(), device=given.device if given.device == "cpu" else None)

    def report(event: Event) -> None:
        reporter.training(event_json(event))

    def report_or_stop(event: Event) -> None:
        report(event)
        if cancelled():
            raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

    prepared = prepare(
        spec,
        place=folders.base / "runs",
        folders=folders,
        on_event=report_or_stop,
        cancelled=cancelled,
        load=load,
    )
    if cancelled():
        raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

    def output(fingerprint: Fingerprint) -> Path:
        is_same = before is not None and _is_same(before, fingerprint)
        folder = (
            before
            if before is not None and is_same
            else _claimed(folders.base / "runs", prepared.spec.name, fingerprint)
        )
        reporter.run(folder)  # reported before the first step, so that a complete run is never trained again
        return folder

    result = train_prepared(prepared, output=output, on_event=report, cancelled=cancelled)
    if result.reason is Outcome.CANCELLED:
        raise CancelledError(f"the job was cancelled after {count_text(len(result.losses), 'step')} and saved")
    return {"outputs": _found(result)}


def _typed(request: Mapping[str, Any]) -> RunSpec:
    try:
        return typed(request, RunSpec)
    except ValueError as error:
        raise OptionError(f"{error}; correct the request") from error


def _is_same(folder: Path, fingerprint: Fingerprint) -> bool:
    """Whether a folder holds an unfinished run with this fingerprint that can be continued."""
    run = RunFolder(folder)
    with contextlib.suppress(LorasmithError):
        return run.exists and not differences(run.record().fingerprint, fingerprint) and not run.is_busy
    return False


def _claimed(runs: Path, title: str, fingerprint: Fingerprint) -> Path:
    """The folder of an unfinished run, or a new one, created here, since workers may begin runs of one name at once."""
    chosen = run_folder(runs, title)
    while True:
        folder = chosen(fingerprint)
        if RunFolder(folder).exists:
            return folder
        ensure_folder(runs)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made ({error.strerror}); check the disk and its permissions"
            ) from error
        return folder


def _found(result: TrainResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "lora": None if result.path is None else result.path.name,
        "verdict": result.verdict,
        "reason": result.reason.value,
    }


def _found_before(folder: Path) -> dict[str, Any]:
    """The outputs of a complete run, read from its folder."""
    history = read_history(folder)
    lora = folder / f"{history.record.title}.safetensors"
    return {
        "steps": len(history.steps()),
        "lora": lora.name if lora.is_file() else None,
        "verdict": next((one.verdict for one in reversed(history.of(Validated))), UNJUDGED),
        "reason": None if history.outcome is None else history.outcome.value,
    }


def measure(
    request: Mapping[str, Any],
    folders: Folders,
    *,
    device: torch.device,
    reporter: JobReporter,
    cancelled: Callable[[], bool],
    load: Load,
) -> dict[str, Any]:
    """Measure the seconds per step and the peak memory of a training, with a `Measuring` event for each stage.
    `request` is `{model, settings, text_encoders, vae}` as in a `RunSpec`. Raises CancelledError, OptionError for a bad
    request, and errors of loading the model.
    """
    given = _typed(request)
    if not given.model:
        raise OptionError("a measurement needs a model, got none; name one")
    base = load(given.files, folders).model
    config = given.trusted().config
    side = latent_side(base, given.data.resolution)
    job = plan_job(base.denoiser, config, device)
    samples = synthetic_samples(base, config.samples_per_step, side, side)

    def begin(stage: str) -> None:
        if cancelled():
            raise CancelledError("the measurement was cancelled")
        reporter.training({"event": "Measuring", "at": time.time(), "stage": stage})

    begin("the model")
    found = measured(job, samples, steps=_STEPS, floor=False, on_stage=begin)
    values = {
        "seconds_per_step": found.step.median,
        "seconds_low": found.step.low,
        "seconds_high": found.step.high,
        "memory_bytes": found.peak,
        "resolution": side * base.components.latent.downscale,
        "at": time.time(),
    }
    return {
        "outputs": values,
        "found": {"subject": measurement_subject(given.model, given.settings, str(device)), "values": values},
    }
