"""Graphs as jobs: one executor, which caches results between them, and the messages of their histories."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.server.job_reporter import JobReporter, graph_end, history_message
from lorasmith.workflow import execution_events as events
from lorasmith.workflow.executor import Executor
from lorasmith.workflow.graph import Graph, validate

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
            self._reporter.training({**event.data, "node_id": event.node_id})
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
