"""How a graph is refused or ends for ComfyUI's clients: an error, the last event, the last message in the history."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


def error_entry(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    """An error in the protocol's form.

    Args:
        kind: its name in the protocol.
        message: one sentence.
        details: what it is about.
        **extra_info: facts for programs.
    """
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def history_message(job_id: str, event: str, **data: Any) -> list[Any]:
    """A message of ComfyUI's history: `[event, {"prompt_id", ..., "timestamp"}]`."""
    return [event, {"prompt_id": job_id, **data, "timestamp": int(1000 * time.time())}]


def graph_end(
    job_id: str,
    error: Mapping[str, Any] | None,
    *,
    node_id: str = "",
    node_type: str = "",
    executed: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Any]]:
    """The notice with which a graph ends that did not complete, as `{"kind", "data"}`, and its message.

    Args:
        job_id: of the job.
        error: `{kind, message, traceback}` of a failure; None if it was cancelled.
        node_id, node_type: of the node at which it ended; empty if it was none.
        executed: nodes that were executed before.
    """
    node = {"node_id": node_id, "node_type": node_type, "executed": list(executed)}
    if error is None:
        data = {"event": "ExecutionCancelled", **node}
        return {"kind": "graph", "data": data}, history_message(job_id, "execution_interrupted", **node)
    data = {"event": "ExecutionFailed", **node, "traceback": [], **error}
    message = history_message(
        job_id,
        "execution_error",
        **node,
        exception_message=data["message"],
        exception_type=data["kind"],
        traceback=data["traceback"],
        current_inputs={},
        current_outputs=[],
    )
    return {"kind": "graph", "data": data}, message
