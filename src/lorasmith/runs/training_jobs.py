"""Trainings in a worker process: one run on images, several over one model (`training.joint`), or a measured one.

The model of the last training is kept for the next one on the same files.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lorasmith.bench.benchmark import latent_side, measured
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.errors import CancelledError, OptionError
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.placement import free_device_memory, free_memory
from lorasmith.core.printable import count_text, printable
from lorasmith.core.typed_json import typed
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, ModelFiles, named_path
from lorasmith.families.model_search import Completed, in_folders, load_completed
from lorasmith.runs.expert_runs import holds
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.queue import measurement_subject
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_log import read_run
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView
from lorasmith.runs.worker import Ended, JobKind, Work, device_of, how_it_ended
from lorasmith.training.events import Event, Outcome, StepDone
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.joint import EngineMaker, StopOfAll, check_captions, train_jointly
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.run_folder import RunFolder, output_folder
from lorasmith.training.train import Plan
from lorasmith.training.validation import UNJUDGED

_BETWEEN_LINES_S = 30.0
_WARM_BYTES = 2 * 2**30  # free memory with which a model is loaded ahead
_TIMED_STEPS = 8  # of a measurement


def job_kinds(work: Work) -> Mapping[str, JobKind]:
    """The jobs of a sweep, each with a log of its own in the folder `logs` of the start message."""
    device = str(work.start["device"])
    named = None if device.startswith("cuda") else device
    return {"train": TrainingJobs(work, lambda job: RunLog(Path(work.start["logs"], f"{job['id']}.txt")), device=named)}


class Reporter(Protocol):
    """Receives what happens in a training."""

    def event(self, event: Event) -> None:
        """An event of its preparation or of its run."""

    def run(self, folder: Path) -> None:
        """It has this run folder."""


class RunLog:
    """The log of a run: its messages, and its step from time to time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0

    def event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            if time.monotonic() - self._last >= _BETWEEN_LINES_S:
                self._last = time.monotonic()
                self.write(f"Step {event.step:,}, loss {event.loss:#.4g}")
        elif message := getattr(event, "message", ""):
            self.write(str(message))

    def run(self, folder: Path) -> None:
        """Nothing: a sweep knows the folders of its runs."""

    def write(self, text: str) -> None:
        """Append lines; on a full disk they are dropped."""
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{printable(text, limit=sys.maxsize, keep=chr(10))}\n")


Samples = tuple[EncodedDataset, EncodedDataset | None]


class _JobHost(Host):
    """Reports events, keeps the worker's model, and continues the run in the folder of an earlier attempt, `before`.

    `encoded` are samples by their images, for runs that train together.
    """

    def __init__(
        self,
        folders: Folders,
        model: WarmModel,
        reporter: Reporter,
        cancelled: Callable[[], bool],
        before: Path | None,
        encoded: dict[object, Samples],
    ) -> None:
        self.folders, self.runs = folders, folders.base / "runs"
        self._model, self._reporter, self._cancelled = model, reporter, cancelled
        self._before, self._encoded = before, encoded
        self._is_begun = False
        self.view = RunView()

    def on_event(self, event: Event) -> None:
        self.view.take(event)
        self._reporter.event(event)
        if not self._is_begun:
            self._end_if_cancelled()

    def cancelled(self) -> bool:
        return self._cancelled()

    def begun(self, cancelled: Callable[[], bool]) -> None:
        """From here on, a run that is cancelled is saved. Raises CancelledError if it is cancelled already."""
        self._cancelled = cancelled
        self._end_if_cancelled()
        self._is_begun = True

    def _end_if_cancelled(self) -> None:
        if self._cancelled():
            raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        return self._model.load(files, folders)

    def samples(self, spec: RunSpec) -> Samples | None:
        return self._encoded.get(images_of(spec))

    def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        """Reported before the first step, so that a complete run is never trained again."""
        before = self._before
        if before is None or plan.output is not None or not holds(before, fingerprint) or RunFolder(before).is_busy:
            folder = super().folder(plan, fingerprint)
        else:
            folder = before  # it holds the same run, unfinished
        self._reporter.run(output_folder(folder, plan.title))
        return folder


def images_of(spec: RunSpec) -> object:
    """What the samples of a run are encoded from, by one model."""
    return spec.sources, spec.data, spec.validation


class TrainingJobs:
    """Trains on folders of images. The request of a job is a `RunSpec` as JSON, with paths relative to the base
    folder; as in files, import paths of optimizers are refused and trackers are not started. Without an `output`, the
    run folder is below `runs/` of the base folder. `device` replaces that of requests.
    """

    def __init__(
        self, work: Work, reporter: Callable[[Mapping[str, Any]], Reporter], *, device: str | None = None
    ) -> None:
        self._work = work
        self._device = device
        self._reporter = reporter
        self.model = WarmModel()

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        if len(jobs) == 1:
            work = self._measure if jobs[0]["kind"] == "measure" else self._train
            ended(jobs[0]["id"], self._end_of(jobs[0], lambda: work(jobs[0])))
        else:
            self._train_together(jobs, ended)

    def free(self) -> None:
        self.model.release()

    def warm(self, model: str) -> None:
        """Load a model for the next job, unless memory is short."""
        if free_memory(torch.device("cpu")) >= _WARM_BYTES:
            self.model.load(RunSpec(model=model).files, self._work.folders())

    def _end_of(self, job: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        return how_it_ended(run, job=job["id"], log=self._work.start["log"])

    def _train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        before = None if job["run"] is None else Path(self._work.start["base"], job["run"])
        if before is not None and RunFolder(before).is_done:  # it completed, but its end was not recorded
            return {"outputs": _found_before(before)}
        with contextlib.ExitStack() as released:
            planned, host = self._planned(job, before, {})
            released.callback(_release, planned)
            end = _trained(planned, host, self._work.cancelled.is_set)
            seconds = host.view.seconds_per_step
            if seconds is None or host.view.step < _TIMED_STEPS:
                return end
            return {**end, **_measurement(spec_of(job["request"]), device_of(self._work.start), seconds)}

    def _train_together(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        """If the jobs are cancelled, all runs end after the same step and save; one that fails ends alone."""
        stop = StopOfAll(self._work.cancelled.is_set)
        ready: dict[str, tuple[FolderPlan, _JobHost]] = {}
        encoded: dict[object, Samples] = {}

        def prepared(job: Mapping[str, Any]) -> dict[str, Any]:
            planned, host = self._planned(job, None, encoded)
            released.callback(_release, planned)
            encoded[images_of(planned.spec)] = planned.data, planned.validation
            check_captions(planned.job, planned.data)
            ready[job["id"]] = planned, host
            return {}

        def trained(job: Mapping[str, Any], engine: EngineMaker) -> None:
            ended(job["id"], self._end_of(job, lambda: _trained(*ready[job["id"]], stop.is_set, engine)))
            unended.discard(job["id"])

        with contextlib.ExitStack() as released:
            for job in jobs:
                if (end := self._end_of(job, partial(prepared, job)))["state"] != "completed":
                    ended(job["id"], end)
            unended = set(ready)
            chosen = [job for job in jobs if job["id"] in ready]
            works = [partial(trained, job) for job in chosen]

            def train() -> dict[str, Any]:
                train_jointly([ready[job["id"]][0].job for job in chosen], works, each_round=stop.look)
                return {}

            if chosen:
                end = self._end_of({"id": "group"}, train)
                for id in sorted(unended):
                    ended(id, end)

    def _planned(
        self, job: Mapping[str, Any], before: Path | None, encoded: dict[object, Samples]
    ) -> tuple[FolderPlan, _JobHost]:
        folders, spec = self._work.folders(), spec_of(job["request"])
        if spec.low_noise_model is not None:
            raise OptionError(
                f"a job trains one model, got low_noise_model {spec.low_noise_model}; send a job for each expert, or "
                "run lorasmith train --low-noise-model"
            )
        if self._work.cancelled.is_set():
            raise CancelledError("the job was cancelled before it began")
        # A worker sees a single GPU.
        named = None if (spec.device or "cuda").startswith("cuda") else spec.device
        output = None if spec.output is None else str(folders.base / spec.output)
        host = _JobHost(folders, self.model, self._reporter(job), self._work.cancelled.is_set, before, encoded)
        return plan(replace(spec.trusted(), device=self._device or named, output=output), host), host

    def _measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The seconds per step and the peak memory of a training."""
        spec, device = spec_of(job["request"]), device_of(self._work.start)
        if not spec.model:
            raise OptionError("a measurement needs a model, got none; name one")
        base = self.model.load(spec.files, self._work.folders()).model
        config = spec.trusted().config
        side = latent_side(base, spec.data.resolution)
        planned = plan_job(base.denoiser, config, device)
        samples = synthetic_samples(
            base, config.samples_per_step, side, side, are_pairs=config.consequences().are_pairs
        )

        def begin(stage: str) -> None:
            if self._work.cancelled.is_set():
                raise CancelledError("the measurement was cancelled")

        begin("the model")
        times = measured(planned, samples, steps=_TIMED_STEPS, floor=False, on_stage=begin)
        values = {
            "seconds_per_step": times.step.median,
            "seconds_low": times.step.low,
            "seconds_high": times.step.high,
            "memory_bytes": times.peak,
            "resolution": side * base.components.latent.downscale,
            "at": time.time(),
        }
        return {"outputs": values, **_measurement(spec, device, **values)}


def _measurement(spec: RunSpec, device: torch.device, seconds_per_step: float, **more: Any) -> dict[str, Any]:
    """The `found` of a job's end, from which later plans of the same model and settings have their time."""
    subject = measurement_subject(spec.model, spec.settings, str(device))
    return {"found": {"subject": subject, "values": {"seconds_per_step": seconds_per_step, **more}}}


def _release(planned: FolderPlan) -> None:
    """Give up the folder of a run, for the next job on it in this process."""
    if planned.claim is not None:
        planned.claim.release()


def _trained(
    planned: FolderPlan, host: _JobHost, cancelled: Callable[[], bool], engine: EngineMaker = engine_of
) -> dict[str, Any]:
    host.begun(cancelled)
    result = run(planned, host, engine)
    if result.reason is Outcome.CANCELLED:
        raise CancelledError(f"the job was cancelled after {count_text(len(result.losses), 'step')} and saved")
    return {"outputs": _found(result)}


def spec_of(request: Mapping[str, Any]) -> RunSpec:
    """The request of a job as a spec. Raises OptionError."""
    try:
        return typed(request, RunSpec)
    except ValueError as error:
        raise OptionError(f"{error}; correct the request") from error


def _found(result: TrainResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "lora": None if result.path is None else result.path.name,
        "verdict": result.verdict,
        "reason": result.reason.value,
    }


def _found_before(folder: Path) -> dict[str, Any]:
    """The outputs of a complete run, read from its folder."""
    run = read_run(folder)
    view, lora = run.view, folder / f"{run.record.title}.safetensors"
    return {
        "steps": view.step,
        "lora": lora.name if lora.is_file() else None,
        "verdict": UNJUDGED if view.validation is None else view.validation.verdict,
        "reason": None if view.outcome is None else view.outcome.value,
    }


class WarmModel:
    """At most one model. Training restores it, so that any number of runs can use it."""

    def __init__(self) -> None:
        self._kept: Completed | None = None
        self._identity: Any = None

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        """As `load_completed`; returns the kept model if its files are the same and unchanged."""
        identity = (files, _identity(files, folders))
        if self._kept is None or self._identity != identity:
            self.release()
            self._kept, self._identity = load_completed(files, folders), identity
        return self._kept

    def release(self) -> None:
        if self._kept is not None:
            self._kept = self._identity = None
            gc.unfreeze()  # a model that was loaded ahead
            free_device_memory()


def _identity(files: ModelFiles, folders: Folders | None) -> list[list[str | int]]:
    """Path, size and time of change of every file that decides what is loaded, including candidates for missing parts,
    so that a better one that is added later is found.
    """
    if folders is None:
        named = [files.model, *files.text_encoders, *([files.vae] if files.vae else [])]
    else:
        named = [
            in_folders(files.model, folders, MODEL_FOLDERS),
            *(in_folders(encoder, folders, ENCODER_FOLDERS) for encoder in files.text_encoders),
            *([in_folders(files.vae, folders, VAE_FOLDERS)] if files.vae else []),
            *(str(root) for kind in (*ENCODER_FOLDERS, *VAE_FOLDERS) for root in folders.roots(kind)),
        ]
    return [fact for name in named for fact in fingerprint(named_path(name))]
