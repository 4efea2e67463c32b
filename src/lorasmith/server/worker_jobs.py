"""Jobs in the worker process: graphs, trainings on folders, measurements; and what is kept between them.

One executor of graphs caches results between them. The model of the last training on a folder is kept for the next one
on the same files.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lorasmith.bench.benchmark import latent_side, measured
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.errors import CancelledError, LorasmithError, OptionError, OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.core.placement import best_device
from lorasmith.core.printable import count_text
from lorasmith.core.typed_json import typed
from lorasmith.families.locating import ModelFiles, built_in_models
from lorasmith.families.model_search import (
    ENCODER_FOLDERS,
    MODEL_FOLDERS,
    VAE_FOLDERS,
    Completed,
    in_folders,
    load_completed,
)
from lorasmith.nodes import load_nodes
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView
from lorasmith.server.child_process import BlockingChannel
from lorasmith.server.job_reporter import JobReporter, graph_end, history_message
from lorasmith.server.jobs import measurement_subject
from lorasmith.server.server_config import folders_of_child
from lorasmith.training.events import Event, Outcome
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences
from lorasmith.training.storage.records import read_history
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.train import Plan
from lorasmith.training.validation import UNJUDGED
from lorasmith.workflow import execution_events as events
from lorasmith.workflow.executor import Executor
from lorasmith.workflow.graph import Graph, validate


class Jobs:
    """Runs jobs one after another. `start` is the server's first message; `cancel` is set to stop a job."""

    def __init__(self, channel: BlockingChannel, start: Mapping[str, Any], *, cancel: threading.Event) -> None:
        self._base = Path(start["base"]).resolve()
        self._start = {**start, "base": str(self._base)}
        self._device = torch.device("cuda") if str(start["device"]).startswith("cuda") else best_device()
        self._cancel = cancel
        self._channel = channel
        self._graphs: GraphJob | None = None
        self._model = WarmModel()
        self._finished: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing

    def run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job; returns `outputs`, `messages` and others. Raises CancelledError, with its run saved."""
        self._finished = _nothing
        request, folders = message["request"], folders_of_child(self._start)
        reporter = JobReporter(self._channel, self._base)
        if self._cancel.is_set():
            raise CancelledError("the job was cancelled before it began")
        if message["kind"] == "graph":
            self._model.release()
            if self._graphs is None or self._graphs.folders != folders:
                self._graphs = GraphJob(folders)
            self._finished = self._graphs.rest
            return self._graphs.run(message["id"], request, reporter=reporter, cancel=self._cancel)
        self._release_graphs()
        if message["kind"] == "train":
            before = None if message["run"] is None else self._base / message["run"]
            return train(
                request,
                folders,
                before=before,
                reporter=reporter,
                cancelled=self._cancel.is_set,
                load=self._model.load,
            )
        return measure(
            request,
            folders,
            device=self._device,
            cancelled=self._cancel.is_set,
            load=self._model.load,
        )

    def rest(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs and messages of a job that did not complete."""
        return self._finished(end)

    def free(self, *, models: bool, memory: bool) -> None:
        """Release cached models and results of nodes."""
        if models or memory:
            self._model.release()
            self._release_graphs()

    def device(self) -> dict[str, Any]:
        if self._device.type != "cuda":
            memory = psutil.virtual_memory()
            return {"memory_bytes": memory.total, "free_bytes": memory.available}
        free, total = torch.cuda.mem_get_info()
        return {
            "memory_bytes": total,
            "free_bytes": free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }

    def is_broken(self) -> bool:
        """Whether the device is unusable in this process, as after an illegal memory access."""
        try:
            return float(torch.ones(2, device=self._device).sum()) != 2.0
        except (RuntimeError, MemoryError):
            return True

    def _release_graphs(self) -> None:
        self._graphs = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _nothing(end: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_LINES = 20  # entries of a traceback that are kept


class GraphJob:
    """Runs graphs one after another, with one executor."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._nodes = load_nodes()
        self._executor = Executor(folders, on_event=self._hear)
        self._begin("", None)

    def _begin(self, id: str, reporter: JobReporter | None) -> None:
        self._id = id
        self._reporter = reporter
        self._graph: Graph | None = None
        self._outputs: dict[str, Any] = {}
        self._messages: list[list[Any]] = []
        self._executed: list[str] = []
        self._node: dict[str, str] = {}
        self._failure: dict[str, Any] = {}

    def run(
        self, id: str, request: Mapping[str, Any], *, reporter: JobReporter, cancel: threading.Event
    ) -> dict[str, Any]:
        """Run a graph; returns `outputs`, `messages` and `last`, the notice of its end. Raises GraphError for a
        malformed prompt, NodeError, or CancelledError after `cancel` is set.
        """
        self._begin(id, reporter)
        targets = request.get("outputs_to_execute") or request.get("targets") or None
        self._graph = validate(request["prompt"], self.folders, nodes=self._nodes, targets=targets)
        workflow = request.get("workflow")
        if workflow is None:
            pnginfo = (request.get("extra_data") or {}).get("extra_pnginfo") or {}
            workflow = pnginfo.get("workflow") if isinstance(pnginfo, dict) else None
        self._executor.run(self._graph, workflow=workflow if isinstance(workflow, dict) else None, cancel=cancel)
        return {
            "outputs": self._outputs,
            "messages": [*self._messages, history_message(id, "execution_success")],
            "last": {"kind": "graph", "data": {"event": "ExecutionFinished"}},
        }

    def rest(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs and messages of a graph that did not complete; adds the node to `end["error"]`."""
        error = end["error"]
        if end["state"] == "failed":
            error = {**error, **self._failure}
        last, message = graph_end(
            self._id, error if end["state"] == "failed" else None, **self._node, executed=self._executed
        )
        return {
            "outputs": self._outputs,
            "messages": [*self._messages, message],
            "last": last,
            "error": {**self._node, **error},
        }

    def _hear(self, event: events.Event) -> None:
        assert self._reporter is not None
        if isinstance(event, events.NodeReport):
            self._reporter.view(event.data, event.node_id)
            return
        data: dict[str, Any] = {"event": type(event).__name__}
        match event:
            case events.ExecutionStarted():
                self._messages = [
                    history_message(self._id, "execution_start"),
                    history_message(self._id, "execution_cached", nodes=list(event.cached)),
                ]
                data |= {"order": list(event.order), "cached": list(event.cached)}
            case events.NodeProgress():
                data |= {
                    "node_id": event.node_id,
                    "value": event.value,
                    "maximum": event.maximum,
                    "text": event.text,
                }
                self._reporter.notice("graph", data, droppable=True, picture=event.preview or b"")
                return
            case events.NodeCached() | events.NodeFinished():
                self._executed.append(event.node_id)
                ui = {kind: list(items) for kind, items in event.ui.items()}
                if ui:
                    self._outputs[event.node_id] = ui
                data |= {"node_id": event.node_id, "ui": ui}
            case events.ExecutionFinished() | events.ExecutionFailed() | events.ExecutionCancelled():
                self._end(event)
                return
            case _:
                data |= asdict(event)
        self._reporter.notice("graph", data)

    def _end(self, event: events.ExecutionFinished | events.ExecutionFailed | events.ExecutionCancelled) -> None:
        """Keep the last event, which is sent with the end of the job, after its history is stored."""
        if isinstance(event, events.ExecutionFinished):
            return
        member = None if self._graph is None else self._graph.nodes.get(event.node_id)
        self._node = {"node_id": event.node_id, "node_type": "" if member is None else member.node.id}
        if isinstance(event, events.ExecutionFailed):
            cause = event.error.__cause__ or event.error
            self._failure = {"title": event.title, "traceback": traceback.format_exception(cause)[-_LINES:]}


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
    begun, and as `plan` and `run`.
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
    device = given.device if given.device == "cpu" else None
    host = _JobHost(folders, before, reporter, cancelled, load)
    planned = plan(replace(given.trusted(), device=device, output=None), host)
    host.end_if_cancelled()
    result = run(planned, host)
    if result.reason is Outcome.CANCELLED:
        raise CancelledError(f"the job was cancelled after {count_text(len(result.losses), 'step')} and saved")
    return {"outputs": _found(result)}


class _JobHost(Host):
    """Reports events to the server, and trains with the worker's model in the folder of an earlier attempt."""

    def __init__(
        self,
        folders: Folders,
        before: Path | None,
        reporter: JobReporter,
        cancelled: Callable[[], bool],
        load: Load,
    ) -> None:
        self.folders, self.runs = folders, folders.base / "runs"
        self._before, self._reporter, self._cancelled, self._load = before, reporter, cancelled, load
        self._has_folder = False

    def on_event(self, event: Event) -> None:
        self._reporter.event(event)
        if not self._has_folder:
            self.end_if_cancelled()

    def cancelled(self) -> bool:
        return self._cancelled()

    def end_if_cancelled(self) -> None:
        if self._cancelled():
            raise CancelledError("the job was cancelled before its first step; what was encoded is kept")

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        return self._load(files, folders)

    def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        """Reported before the first step, so that a complete run is never trained again."""
        before = self._before
        folder = before if before is not None and _is_same(before, fingerprint) else self._claimed(plan, fingerprint)
        self._has_folder = True
        self._reporter.run(folder)
        return folder

    def _claimed(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        """The folder of an unfinished run, or a new one, created here: workers may begin runs of one name at once."""
        while True:
            folder = super().folder(plan, fingerprint)
            if RunFolder(folder).exists:
                return folder
            ensure_folder(folder.parent)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(
                    f"{folder} cannot be made ({error.strerror}); check the disk and its permissions"
                ) from error
            return folder


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
    view = RunView.of(history.events)
    lora = folder / f"{history.record.title}.safetensors"
    return {
        "steps": len(view.points),
        "lora": lora.name if lora.is_file() else None,
        "verdict": UNJUDGED if view.validation is None else view.validation.verdict,
        "reason": None if view.outcome is None else view.outcome.value,
    }


def measure(
    request: Mapping[str, Any],
    folders: Folders,
    *,
    device: torch.device,
    cancelled: Callable[[], bool],
    load: Load,
) -> dict[str, Any]:
    """Measure the seconds per step and the peak memory of a training.
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
