"""Trainings in a worker process: one run on images, or several over one model (`training.joint`).

The model of the last training is kept for the next one on the same files.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lorasmith.core.errors import CancelledError, LorasmithError, OptionError, OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.printable import count_text, printable
from lorasmith.core.typed_json import typed
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ModelFiles, built_in_models
from lorasmith.families.model_search import (
    ENCODER_FOLDERS,
    MODEL_FOLDERS,
    VAE_FOLDERS,
    Completed,
    in_folders,
    load_completed,
)
from lorasmith.runs.folder_run import PreparedRun, prepare, train_prepared
from lorasmith.runs.model_run import run_folder
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.worker import Ended, JobKind, Work, how_it_ended
from lorasmith.training.events import Event, StepDone, Validated
from lorasmith.training.joint import EngineMaker, StopOfAll, check_captions, train_jointly
from lorasmith.training.outcome import Outcome
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences
from lorasmith.training.storage.history import read_history
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.train import RunOptions
from lorasmith.training.verdict import UNJUDGED

_BETWEEN_LINES_S = 30.0


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


@dataclass
class _Training:
    """A training that is prepared; `before` is the run folder of an earlier attempt."""

    prepared: PreparedRun
    before: Path | None
    reporter: Reporter
    runs: Path

    def release(self) -> None:
        """Give up its folder, for the next job on it in this process."""
        if self.prepared.claim is not None:
            self.prepared.claim.release()


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
            ended(jobs[0]["id"], self._end_of(jobs[0], lambda: self._train(jobs[0])))
        else:
            self._train_together(jobs, ended)

    def free(self) -> None:
        self.model.release()

    def _end_of(self, job: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        return how_it_ended(run, job=job["id"], log=self._work.start["log"])

    def _train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        before = None if job["run"] is None else Path(self._work.start["base"], job["run"])
        if before is not None and RunFolder(before).is_done:  # it completed, but its end was not recorded
            return {"outputs": _found_before(before)}
        one = self._prepared(job, before)
        try:
            return self._trained(one, self._work.cancelled.is_set)
        finally:
            one.release()

    def _train_together(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        """If the jobs are cancelled, all runs end after the same step and save; one that fails ends alone."""
        stop = StopOfAll(self._work.cancelled.is_set)
        ready: dict[str, _Training] = {}
        encoded: dict[object, tuple[EncodedDataset, EncodedDataset | None]] = {}

        def prepared(job: Mapping[str, Any]) -> dict[str, Any]:
            given = spec_of(job["request"])
            images = given.sources, given.data, given.validation
            one = self._prepared(job, None, samples=encoded.get(images))
            released.callback(one.release)
            encoded[images] = one.prepared.data, one.prepared.validation
            check_captions(one.prepared.job, one.prepared.data)
            ready[job["id"]] = one
            return {}

        def trained(job: Mapping[str, Any], engine: EngineMaker) -> None:
            one = ready[job["id"]]
            ended(job["id"], self._end_of(job, lambda: self._trained(one, stop.is_set, engine=engine)))
            unended.discard(job["id"])

        with contextlib.ExitStack() as released:
            for job in jobs:
                if (end := self._end_of(job, partial(prepared, job)))["state"] != "completed":
                    ended(job["id"], end)
            unended = set(ready)
            chosen = [job for job in jobs if job["id"] in ready]
            works = [partial(trained, job) for job in chosen]

            def train() -> dict[str, Any]:
                train_jointly([ready[job["id"]].prepared.job for job in chosen], works, each_round=stop.look)
                return {}

            if chosen:
                end = self._end_of({"id": "group"}, train)
                for id in sorted(unended):
                    ended(id, end)

    def _prepared(
        self,
        job: Mapping[str, Any],
        before: Path | None,
        *,
        samples: tuple[EncodedDataset, EncodedDataset | None] | None = None,
    ) -> _Training:
        folders, cancelled, reporter = self._work.folders(), self._work.cancelled.is_set, self._reporter(job)
        given = spec_of(job["request"])
        if given.low_noise_model is not None:
            raise OptionError(
                f"a job trains one model, got low_noise_model {given.low_noise_model}; send a job for each expert, or "
                "run lorasmith train --low-noise-model"
            )
        # A worker sees a single GPU.
        named = None if (given.device or "cuda").startswith("cuda") else given.device
        spec = replace(given.trusted(), device=self._device or named)

        def report_or_stop(event: Event) -> None:
            reporter.event(event)
            if cancelled():
                raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

        if cancelled():
            raise CancelledError("the job was cancelled before it began")
        prepared = prepare(
            spec,
            output=None if spec.output is None else folders.base / spec.output,
            runs=folders.base / "runs",
            folders=folders,
            on_event=report_or_stop,
            cancelled=cancelled,
            load=self.model.load,
            samples=samples,
        )
        return _Training(prepared, before, reporter, folders.base / "runs")

    def _trained(
        self, one: _Training, cancelled: Callable[[], bool], *, engine: EngineMaker = RunOptions.engine
    ) -> dict[str, Any]:
        spec = one.prepared.spec
        if cancelled():
            raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

        def chosen(fingerprint: Fingerprint) -> Path:
            is_same = one.before is not None and _is_same(one.before, fingerprint)
            folder = one.before if one.before is not None and is_same else _claimed(one.runs, spec.name, fingerprint)
            one.reporter.run(folder)  # reported before the first step, so that a complete run is never trained again
            return folder

        given = None if spec.output is None else one.runs.parent / spec.output
        result = train_prepared(
            one.prepared, output=given or chosen, on_event=one.reporter.event, cancelled=cancelled, engine=engine
        )
        if result.reason is Outcome.CANCELLED:
            raise CancelledError(f"the job was cancelled after {count_text(len(result.losses), 'step')} and saved")
        return {"outputs": _found(result)}


def spec_of(request: Mapping[str, Any]) -> RunSpec:
    """The request of a job as a spec. Raises OptionError."""
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
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _identity(files: ModelFiles, folders: Folders | None) -> list[list[str | int]]:
    """Path, size and time of change of every file that decides what is loaded, including candidates for missing parts,
    so that a better one that is added later is found.
    """
    if folders is None:
        named = [files.model, *files.text_encoders, *([files.vae] if files.vae else [])]
    else:
        named = [
            in_folders(files.model, folders, MODEL_FOLDERS),
            *(in_folders(one, folders, ENCODER_FOLDERS) for one in files.text_encoders),
            *([in_folders(files.vae, folders, VAE_FOLDERS)] if files.vae else []),
            *(str(root) for kind in (*ENCODER_FOLDERS, *VAE_FOLDERS) for root in folders.roots(kind)),
        ]
    built_in = built_in_models()
    return [fact for name in named for fact in fingerprint(built_in.get(name, Path(name)))]
