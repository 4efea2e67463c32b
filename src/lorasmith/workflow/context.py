"""What a node function is given besides its inputs: the folders, the workflow it runs in, a way to report and stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasmith.core.errors import CancelledError
from lorasmith.core.folders import Folders
from lorasmith.workflow.execution_events import Event, NodeMessage, NodeProgress

__all__ = ["NodeContext", "ignore"]


def ignore(event: Event) -> None:
    """An event callback for those who do not listen."""


@dataclass(frozen=True)
class NodeContext:
    """The surroundings of one node in one run. `NodeContext(folders)` serves to call a node function by itself.

    Attributes:
        folders: where models, inputs and outputs lie.
        node_id: id of the node in the prompt.
        prompt: the whole API-format workflow, to be written into files that the node saves.
        workflow: the editor's own JSON of the same graph, where the sender gave it.
        cancel: set by whoever wants the run to stop.
        report: receives the node's events.
    """

    folders: Folders
    node_id: str = ""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    workflow: Mapping[str, Any] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    report: Callable[[Event], None] = ignore

    def cancelled(self) -> bool:
        """Whether somebody asked the run to stop. Long nodes ask once a step, save what they have and raise."""
        return self.cancel.is_set()

    def raise_if_cancelled(self) -> None:
        """Raises CancelledError when somebody asked the run to stop."""
        if self.cancelled():
            raise CancelledError("the run was cancelled")

    def progress(self, value: int, maximum: int, *, text: str = "", preview: bytes | None = None) -> None:
        """Report that `value` of `maximum` steps are done; see `NodeProgress`."""
        self.report(NodeProgress(self.node_id, value, maximum, text, preview))

    def log(self, text: str) -> None:
        """Tell something worth knowing in one line."""
        self.report(NodeMessage(self.node_id, "info", text))

    def warn(self, text: str) -> None:
        """Tell something that people should act on in one line."""
        self.report(NodeMessage(self.node_id, "warning", text))
