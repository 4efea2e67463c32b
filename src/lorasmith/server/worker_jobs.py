"""What the server's worker processes do besides training: graphs, drawings, and answers to questions.

One executor of graphs caches results between them.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.core.errors import CancelledError
from lorasmith.core.folders import TRIED, Folders
from lorasmith.core.placement import free_device_memory
from lorasmith.core.typed_json import typed
from lorasmith.data.captioners import Captioner, load_captioner
from lorasmith.data.image_files import open_image
from lorasmith.evaluation.evaluation_record import DrawingSettings
from lorasmith.families.locating import BUILT_IN, ModelFiles, built_in_models
from lorasmith.families.model import Model
from lorasmith.nodes import load_nodes
from lorasmith.runs.captioning import made_caption
from lorasmith.runs.drawing import draw_beside
from lorasmith.runs.evaluate import evaluate, subject_of
from lorasmith.runs.gallery import draw_grid
from lorasmith.runs.training_jobs import TrainingJobs, WarmModel
from lorasmith.runs.worker import Ended, JobKind, Work, device_of, folders_of_start, how_it_ended
from lorasmith.sampling.generate import Sampling
from lorasmith.server.datasets.dataset_answers import dataset, picture_of
from lorasmith.server.datasets.dataset_change_answers import StaleCaptionError, set_captions
from lorasmith.server.datasets.dataset_folders import UnknownFileError, dataset_folder
from lorasmith.server.datasets.dataset_shapes import CaptionEdit
from lorasmith.server.job_reporter import JobReporter, graph_end, history_message
from lorasmith.workflow import execution_events as events
from lorasmith.workflow.executor import Executor
from lorasmith.workflow.graph import Graph, validate


def job_kinds(work: Work) -> Mapping[str, JobKind]:
    """The kinds of jobs of a server."""
    base = Path(work.start["base"]).resolve()
    training = TrainingJobs(work, lambda job: JobReporter(work.channel, base))
    drawing = DrawJobs(work)
    return {
        "train": training,
        "measure": training,
        "graph": GraphJobs(work),
        "draw": drawing,
        "evaluate": drawing,
        "caption": CaptionJobs(work),
    }


def warm(kinds: Mapping[str, JobKind]) -> None:
    """Make ready what the example of the first open trains: the built-in model, if it is installed."""
    training = kinds["train"]
    assert isinstance(training, TrainingJobs)
    try:
        if built_in_models():
            training.warm(BUILT_IN)
    except Exception:  # any: the job that needs it says it
        logging.getLogger("lorasmith").warning("nothing was loaded ahead:\n%s", traceback.format_exc())


def answers(start: Mapping[str, Any]) -> Callable[[str, Mapping[str, Any]], Any]:
    """The function that answers a question, by its name and arguments."""
    from lorasmith.server.questions import answer, load_questions

    load_questions()
    return lambda question, arguments: answer(question, arguments, folders_of_start(start))


class DrawJobs:
    """Draws a prompt without and with the LoRA of a run, from the same noise, or evaluates the LoRAs of one, and keeps
    the model.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._model = WarmModel()

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        (job,) = jobs
        is_grid = job["kind"] == "draw" and "wish" in job["request"]
        draw = self._evaluate if job["kind"] == "evaluate" else self._draw_grid if is_grid else self._draw

        def work() -> dict[str, Any]:
            if self._work.cancelled.is_set():
                raise CancelledError("the job was cancelled before it began")
            return draw(job["request"])

        ended(job["id"], how_it_ended(work, job=job["id"], log=self._work.start["log"]))

    def free(self) -> None:
        self._model.release()

    def _evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folders, cancelled = self._work.folders(), self._work.cancelled.is_set
        reporter = JobReporter(self._work.channel, folders.base)
        drawing = typed(request.get("drawing", {}), DrawingSettings)
        trigger = request.get("subject") or None
        subject = subject_of([folders.base / request["run"]], trigger=trigger, most=drawing.most)
        model = self._model.load(typed(request["files"], ModelFiles), folders).model
        progress = reporter.drawing(drawing.steps or model.defaults.steps)
        found = evaluate(model, subject, drawing, progress=progress, cancelled=cancelled)
        return {"outputs": {"sentence": found.sentence}}

    def _draw_grid(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folders, cancelled = self._work.folders(), self._work.cancelled.is_set
        run = folders.base / request["run"]
        model = self._model.load(typed(request["files"], ModelFiles), folders).model
        grid = draw_grid(
            model,
            run,
            [(step, run / Path(name).name) for step, name in request["loras"]],
            request["strengths"],
            wish=request["wish"],
            prompt=request["text"],
            sampling=self._sampling(model, request),
            progress=JobReporter(self._work.channel, folders.base).drawing(model.defaults.steps),
            cancelled=cancelled,
        )
        return {"outputs": {"prompt": grid.prompt}}

    def _sampling(self, model: Model, request: Mapping[str, Any]) -> Sampling:
        return Sampling(
            seed=request.get("seed", 0),
            steps=model.defaults.steps,
            frames=request["frames"],
        )

    def _draw(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folders, cancelled = self._work.folders(), self._work.cancelled.is_set
        reporter = JobReporter(self._work.channel, folders.base)
        run, title = folders.base / request["run"], Path(request["lora"]).name
        controls = [open_image(run / TRIED / request["control"])] if request["control"] else []
        model = self._model.load(typed(request["files"], ModelFiles), folders).model
        strengths = (request["strength"], *request.get("strengths", ()))
        pictures: list[str] = []

        def saved(paths: Sequence[Path]) -> None:
            pictures[:] = [path.relative_to(run).as_posix() for path in paths]

        _, note = draw_beside(
            model.denoiser,
            run / title,
            request["text"],
            self._sampling(model, request),
            strengths=strengths,
            folder=run / TRIED,
            controls=controls,
            progress=reporter.drawing(model.defaults.steps, pictures),
            saved=saved,
            cancelled=cancelled,
        )
        shown = [0.0, *strengths][: len(pictures)]
        return {"outputs": {"pictures": pictures, "strengths": shown, "notes": [note] if note else []}}


class CaptionJobs:
    """Writes captions of a dataset, one by one, where the caption is still the one that was there when the job was
    queued; and keeps the captioner.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._captioner: tuple[str, Captioner] | None = None

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        (job,) = jobs
        ended(job["id"], how_it_ended(partial(self._run, job["request"]), job=job["id"], log=self._work.start["log"]))

    def free(self) -> None:
        self._captioner = None
        gc.collect()

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        folders, cancelled = self._work.folders(), self._work.cancelled.is_set
        reporter = JobReporter(self._work.channel, folders.base)
        name, model, photos = request["name"], request["captioner"], request["photos"]
        if self._captioner is None or self._captioner[0] != model:
            self._captioner = None
            self._captioner = model, load_captioner(model, device_of(self._work.start))
        captioner = self._captioner[1]
        there = {image.file: image.caption for image in dataset(folders, name).images}
        written: dict[str, dict[str, str]] = {}
        changed: list[str] = []
        empty: list[str] = []
        failed: dict[str, str] = {}
        for done, (file, seen) in enumerate(photos.items()):
            reporter.notice("progress", {"value": done, "maximum": len(photos), "text": file}, droppable=True)
            if cancelled():
                break
            if there.get(file) != seen:  # changed since, or by this job before it was interrupted
                changed.append(file)
                continue
            caption, fault = self._caption(folders, name, file, captioner, request["trigger"])
            if fault:
                failed[file] = fault
            elif not caption:
                empty.append(file)
            elif self._is_stored(folders, name, file, CaptionEdit(caption=caption, seen=seen)):
                written[file] = {"before": seen, "caption": caption}
                reporter.notice("dataset", {"name": name})
            else:
                changed.append(file)
        outputs = {"written": written, "changed": changed, "empty": empty, "failed": failed}
        return {"state": "cancelled" if cancelled() else "completed", "outputs": outputs}

    def _caption(self, folders: Folders, name: str, file: str, captioner: Captioner, trigger: str) -> tuple[str, str]:
        try:
            picture = picture_of(dataset_folder(folders, name, to_change=True), file)
        except UnknownFileError:
            return "", "was removed"
        return made_caption(picture, captioner, trigger)

    def _is_stored(self, folders: Folders, name: str, file: str, edit: CaptionEdit) -> bool:
        try:
            set_captions(folders, name, {file: edit})
        except StaleCaptionError:
            return False
        return True


_LINES = 20  # entries of a traceback that are kept


class GraphJobs:
    """Runs graphs one after another, with one executor as long as the folders stay the same."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._base = Path(work.start["base"]).resolve()
        self._nodes = load_nodes()
        self._folders: Folders | None = None
        self._executor: Executor | None = None
        self._begin("")

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        (job,) = jobs
        self._begin(job["id"])
        end = how_it_ended(partial(self._run, job["request"]), job=job["id"], log=self._work.start["log"])
        ended(job["id"], end if end["state"] == "completed" else {**end, **self._rest(end)})

    def free(self) -> None:
        self._folders = self._executor = None
        free_device_memory()

    def _begin(self, id: str) -> None:
        self._id = id
        self._reporter = JobReporter(self._work.channel, self._base)
        self._graph: Graph | None = None
        self._outputs: dict[str, Any] = {}
        self._messages: list[list[Any]] = []
        self._executed: list[str] = []
        self._node: dict[str, str] = {}
        self._failure: dict[str, Any] = {}

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph; returns `outputs`, `messages` and `last`, the notice of its end. Raises GraphError for a
        malformed prompt, NodeError, or CancelledError.
        """
        folders = self._work.folders()
        if self._work.cancelled.is_set():
            raise CancelledError("the job was cancelled before it began")
        if self._executor is None or self._folders != folders:
            self._folders, self._executor = folders, Executor(folders, on_event=self._on_event)
        targets = request.get("outputs_to_execute") or request.get("targets") or None
        self._graph = validate(request["prompt"], folders, nodes=self._nodes, targets=targets)
        workflow = request.get("workflow")
        if workflow is None:
            pnginfo = (request.get("extra_data") or {}).get("extra_pnginfo") or {}
            workflow = pnginfo.get("workflow") if isinstance(pnginfo, dict) else None
        workflow = workflow if isinstance(workflow, dict) else None
        self._executor.run(self._graph, workflow=workflow, cancel=self._work.cancelled)
        return {
            "outputs": self._outputs,
            "messages": [*self._messages, history_message(self._id, "execution_success")],
            "last": {"kind": "graph", "data": {"event": "ExecutionFinished"}},
        }

    def _rest(self, end: Mapping[str, Any]) -> dict[str, Any]:
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

    def _on_event(self, event: events.Event) -> None:
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
