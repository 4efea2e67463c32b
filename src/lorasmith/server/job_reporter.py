"""What is reported of a job: events of training and of its preparation as JSON, and how a graph is refused or ends.

Events of preparation are summarised. ComfyUI's clients are told of a graph by an error, a last event, and a last
message of its history.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasmith.runs.child_process import BlockingChannel
from lorasmith.runs.run_plan import (
    ClassImageDrawn,
    EncodersHashed,
    ImageEncoded,
    ImagesChecked,
    ImagesFound,
    ModelLoading,
    RunPlan,
    RunPlanned,
    captions_used,
)
from lorasmith.training.events import CaptionEncoded, Drawing, Event, StepDone, encoded


class JobReporter:
    """Sends a job's reports. A closed channel is ignored here; it cancels the job. Run ids are relative to `base`."""

    def __init__(self, channel: BlockingChannel, base: Path) -> None:
        self._channel = channel
        self._base = base
        self._run = ""

    def notice(self, kind: str, data: Mapping[str, Any], *, droppable: bool = False, picture: bytes = b"") -> None:
        head = {"type": "notice", "kind": kind, "data": finite(data), "droppable": droppable}
        with contextlib.suppress(OSError):
            self._channel.send(head, picture)

    def run(self, folder: Path) -> None:
        folder = folder.resolve()
        is_inside = folder.is_relative_to(self._base)
        run = folder.relative_to(self._base).as_posix() if is_inside else folder.as_posix()
        if run != self._run:
            self._run = run
            with contextlib.suppress(OSError):
                self._channel.send({"type": "run", "run": run})

    def event(self, event: Event) -> None:
        self.training(event_json(event))

    def training(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "RunStarted" and event["folder"]:
            self.run(Path(event["folder"]))
        self.notice("training", event, droppable=event["event"] in PROGRESS)


_PREPARING = (ImageEncoded, ClassImageDrawn, EncodersHashed)
PROGRESS = frozenset(kind.__name__ for kind in (StepDone, *_PREPARING, CaptionEncoded, Drawing))
"""Events that newer ones replace for a slow reader."""

_MOST_LISTED = 100


def event_json(event: Event) -> dict[str, Any]:
    """An event: `{"event": its class, "at": seconds, ...}`. NaN and infinity become null."""
    head = {"event": type(event).__name__, "at": event.at}
    match event:
        case ImagesFound():
            scan = event.scan
            body = {
                "folder": str(event.folder),
                "images": len(scan.images),
                "captions": captions_used(scan.images, event.trigger),
                "skipped": [{"file": path.name, "reason": why} for path, why in scan.skipped[:_MOST_LISTED]],
                "skipped_count": len(scan.skipped),
                "notes": list(scan.notes),
            }
        case ImagesChecked():
            found = event.check.preflight.findings
            body = {"findings": [{"kind": one.kind, "message": one.sentence} for one in found[:_MOST_LISTED]]}
        case ModelLoading():
            body = {"model": event.model}
        case RunPlanned():
            body = _plan(event.plan)
        case ImageEncoded():
            body = {"done": event.done, "total": event.total, "cached": event.cached}
        case ClassImageDrawn() | EncodersHashed():
            body = {"done": event.done, "total": event.total}
        case _:
            found_json: dict[str, Any] = finite(json.loads(encoded(event)))
            return found_json
    result: dict[str, Any] = finite({**head, **body})
    return result


def finite(value: Any) -> Any:
    """JSON values with NaN and infinity replaced by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def _plan(plan: RunPlan) -> dict[str, Any]:
    config = plan.config
    return {
        "model": plan.model,
        "family": plan.family,
        "found": [{"part": one.title, "file": one.path.name, "place": one.place} for one in plan.found],
        "images": len(plan.scan.images),
        "held_out": list(plan.held_out),
        "trigger": plan.trigger,
        "resolutions": list(plan.resolutions),
        "trained": plan.trained,
        "parameters": plan.parameters,
        "steps": config.steps,
        "epochs": plan.epochs,
        "samples": plan.samples,
        "settings": asdict(config),
        "data": dict(plan.data),
        "notes": list(plan.notes),
    }


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
