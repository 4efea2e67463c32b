"""Jobs as ComfyUI's clients see them: entries of the queue, of the history, and of `/api/jobs`.

Trainings on folders, unknown to the protocol, are listed with an empty prompt, since they occupy the device too. Paused
and interrupted jobs are shown as cancelled: the protocol has no state for jobs that can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorasmith.server.jobs import Job, JobState

STATES_OF_STATUS: Mapping[str, tuple[JobState, ...]] = {
    "pending": ("pending",),
    "in_progress": ("running",),
    "completed": ("completed",),
    "failed": ("failed",),
    "cancelled": ("cancelled", "paused", "interrupted"),
}
"""Job states by the protocol's status."""

JOB_STATUSES = {state: status for status, states in STATES_OF_STATUS.items() for state in states}


def queue_entry(job: Job) -> list[Any]:
    """`[number, id, prompt, extra_data, outputs to execute]`."""
    return [job.number, job.id, job.request.get("prompt", {}), _extra_data(job), _outputs_to_execute(job)]


def history_entry(job: Job) -> dict[str, Any]:
    """An ended job as an entry of `/history`."""
    return {
        "prompt": queue_entry(job),
        "outputs": dict(job.outputs),
        "meta": {node: node_names(node) for node in job.outputs},
        "status": _status(job),
    }


def node_names(node_id: str) -> dict[str, Any]:
    """A node's ids, which differ in ComfyUI only for nodes created during execution."""
    return {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}


def job_summary(job: Job) -> dict[str, Any]:
    """A job as listed by `/api/jobs`, without null values."""
    count, previewable, preview = _outputs_summary(job.outputs)
    ended = job.state not in ("pending", "running")
    workflow = _workflow(job)
    values = {
        "id": job.id,
        "status": JOB_STATUSES[job.state],
        "priority": job.number,
        "create_time": milliseconds(job.created),
        "execution_start_time": milliseconds(job.started) if ended else None,
        "execution_end_time": milliseconds(job.ended) if ended else None,
        "execution_error": _failure(job) if job.state == "failed" else None,
        "outputs_count": count,
        "previewable_outputs_count": previewable,
        "preview_output": preview,
        "workflow_id": workflow.get("id") if isinstance(workflow, dict) else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def job_detail(job: Job) -> dict[str, Any]:
    """A job as returned by `/api/jobs/{id}`."""
    summary = job_summary(job)
    if job.state in ("pending", "running"):
        return summary
    workflow = {"prompt": job.request.get("prompt", {}), "extra_data": _extra_data(job)}
    return summary | {"outputs": dict(job.outputs), "execution_status": _status(job), "workflow": workflow}


def history_messages(job: Job) -> list[list[Any]]:
    """The recorded messages of a job; without any, messages made from its times and state."""
    messages = [list(one) for one in job.messages]
    if not messages and job.started is not None:
        messages.append(["execution_start", {"prompt_id": job.id, "timestamp": milliseconds(job.started)}])
    ending = ending_message(job)
    has_end = ending is None or any(name == ending[0] for name, _ in messages)
    return messages if has_end or ending is None else [*messages, list(ending)]


def ending_message(job: Job) -> tuple[str, dict[str, Any]] | None:
    """Name and data of the message that ends a job; None if it has not ended."""
    name = _ENDINGS.get(job.state)
    recorded = next((data for event, data in reversed(job.messages) if event == name), None)
    if name is not None and recorded is not None:
        return name, recorded
    stamp = {"prompt_id": job.id, "timestamp": milliseconds(job.ended)}
    if name == "execution_success":
        return name, stamp
    if name == "execution_error":
        return name, _failure(job)
    if name is None:
        return None
    error = job.error or {}
    return name, stamp | {key: error.get(key) for key in ("node_id", "node_type")} | {
        "executed": error.get("executed", [])
    }


def milliseconds(seconds: float | None) -> int | None:
    """Seconds to milliseconds."""
    return None if seconds is None else int(seconds * 1000)


def _failure(job: Job) -> dict[str, Any]:
    error = job.error or {}
    return {
        "prompt_id": job.id,
        "timestamp": milliseconds(job.ended),
        "node_id": error.get("node_id"),
        "node_type": error.get("node_type"),
        "executed": error.get("executed", []),
        "exception_message": error.get("message", "the job failed"),
        "exception_type": error.get("kind", "Error"),
        "traceback": error.get("traceback", []),
        "current_inputs": error.get("current_inputs", {}),
        "current_outputs": error.get("current_outputs", []),
    }


def _status(job: Job) -> dict[str, Any]:
    good = job.state == "completed"
    messages = history_messages(job)
    return {"status_str": "success" if good else "error", "completed": good, "messages": messages}


def _extra_data(job: Job) -> dict[str, Any]:
    extra = dict(job.request.get("extra_data") or {})
    if job.client_id is not None:
        extra.setdefault("client_id", job.client_id)
    extra.setdefault("create_time", milliseconds(job.created))
    if job.kind != "graph":
        extra["lorasmith"] = {"kind": job.kind, "name": job.request.get("name")}
    return extra


def _outputs_to_execute(job: Job) -> list[str]:
    return list(job.request.get("outputs_to_execute") or ())


def _workflow(job: Job) -> Any:
    pictures = (job.request.get("extra_data") or {}).get("extra_pnginfo")
    return pictures.get("workflow") if isinstance(pictures, dict) else None


def _outputs_summary(outputs: Mapping[str, Any]) -> tuple[int, int, dict[str, Any] | None]:
    """Number of outputs, number of those with a preview, and the preview: saved pictures before temporary ones."""
    files = list(_files(outputs))
    shown = [(node, kind, item) for node, kind, item in files if kind in _SHOWN_KINDS]
    saved = [one for one in shown if one[2].get("type") == "output"]
    if shown:
        node, kind, item = (saved or shown)[0]
        return len(files), len(shown), {**item, "nodeId": node, "mediaType": item.get("mediaType", kind)}
    return len(files), 0, _text_preview(outputs)


def _files(outputs: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for node, kinds in outputs.items():
        for kind, items in kinds.items() if isinstance(kinds, dict) else ():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict):
                    yield node, kind, item


def _text_preview(outputs: Mapping[str, Any]) -> dict[str, Any] | None:
    for node, kinds in outputs.items():
        texts = kinds.get("text") if isinstance(kinds, dict) else None
        if isinstance(texts, list) and texts and isinstance(texts[0], str):
            preview: dict[str, Any] = {"content": texts[0][:_LONGEST], "nodeId": node, "mediaType": "text"}
            return preview | ({"truncated": True} if len(texts[0]) > _LONGEST else {})
    return None


_ENDINGS = {
    "completed": "execution_success",
    "failed": "execution_error",
    **dict.fromkeys(("cancelled", "paused", "interrupted"), "execution_interrupted"),
}
_SHOWN_KINDS = frozenset({"images", "video", "audio", "3d", "text", "gifs"})
_LONGEST = 1024
