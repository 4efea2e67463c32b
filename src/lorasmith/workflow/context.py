"""The first argument of node functions: folders, the running workflow, reporting and cancellation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasmith.core.errors import CancelledError
from lorasmith.core.folders import Folders
from lorasmith.workflow.execution_events import Event, NodeMessage, NodeProgress, NodeReport


def ignore(event: Event) -> None:
    """An event callback that does nothing."""


@dataclass(frozen=True)
class NodeContext:
    """The context of one node in one run; `NodeContext(folders)` is enough to call a node function directly.

    Attributes:
        folders: of models, inputs and outputs.
        node_id: id of the node in the prompt.
        prompt: the whole API-format workflow, for the metadata of saved files.
        workflow: the editor's JSON of the same graph, if the client sent it.
        cancel: set to stop the run.
        report: receives the node's events.
    """

    folders: Folders
    node_id: str = ""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    workflow: Mapping[str, Any] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    report: Callable[[Event], None] = ignore

    def cancelled(self) -> bool:
        """Whether the run was cancelled. Long nodes check it once per step, save their result and raise."""
        return self.cancel.is_set()

    def raise_if_cancelled(self) -> None:
        if self.cancelled():
            raise CancelledError("the run was cancelled")

    def progress(self, value: int, maximum: int, *, text: str = "", preview: bytes | None = None) -> None:
        """Report that `value` of `maximum` steps are done; see `NodeProgress`."""
        self.report(NodeProgress(self.node_id, value, maximum, text, preview))

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Report JSON values for programs; see `NodeReport`."""
        self.report(NodeReport(self.node_id, kind, data))

    def log(self, text: str) -> None:
        """Report information in one line."""
        self.report(NodeMessage(self.node_id, "info", text))

    def warn(self, text: str) -> None:
        """Report a warning in one line."""
        self.report(NodeMessage(self.node_id, "warning", text))
