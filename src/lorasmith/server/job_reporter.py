"""What is reported of a job: the view of its run, events of a graph, and how a graph is refused or ends.

ComfyUI's clients receive of a graph an error, a last event, and a last message of its history.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.runs.child_process import BlockingChannel
from lorasmith.runs.view import ViewPublisher


class JobReporter:
    """Sends a job's reports. A closed channel is ignored here; it cancels the job. Run ids are relative to `base`.

    `event` receives the events of a run and of its preparation, and sends their view.
    """

    def __init__(self, channel: BlockingChannel, base: Path) -> None:
        self._channel = channel
        self._base = base
        self._run = ""
        self.event = ViewPublisher(self.view)

    def notice(self, kind: str, data: Mapping[str, Any], *, droppable: bool = False, picture: bytes = b"") -> None:
        head = {"type": "notice", "kind": kind, "data": finite(data), "droppable": droppable}
        with contextlib.suppress(OSError):
            self._channel.send(head, picture)

    def drawing(self, steps: int, files: Sequence[str] = ()) -> Callable[[int, int], None]:
        """What reports the progress of pictures of so many sampling steps each: those done, and all; and the files that
        there are so far, to which the caller adds.
        """

        def progress(done: int, total: int) -> None:
            state: dict[str, Any] = {"value": done, "maximum": total, "pictures": total // steps}
            state |= {"files": list(files)} if files else {}
            self.notice("progress", state, droppable=True)

        return progress

    def run(self, folder: Path) -> None:
        folder = folder.resolve()
        is_inside = folder.is_relative_to(self._base)
        run = folder.relative_to(self._base).as_posix() if is_inside else folder.as_posix()
        if run != self._run:
            self._run = run
            with contextlib.suppress(OSError):
                self._channel.send({"type": "run", "run": run})

    def view(self, view: Mapping[str, Any], node_id: str | None = None) -> None:
        """Send a `RunView` as JSON, that of a node in a graph."""
        if view["run"]:
            self.run(Path(view["run"]))
        self.notice("view", {"node_id": node_id, "view": {**view, "run": self._run}})


def finite(value: Any) -> Any:
    """JSON values with NaN and infinity replaced by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


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
