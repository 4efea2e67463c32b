"""How the refusal or end of a graph is reported to ComfyUI's clients: error, last event, last history message."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


def error_entry(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    """An error in the protocol's form: its kind there, a sentence, its context, and facts for programs."""
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
    """The last notice, `{"kind", "data"}`, and the history message of a graph that did not complete. `error` is `{kind,
    message, traceback}`, or None if cancelled; `executed` are the nodes that had finished.
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
