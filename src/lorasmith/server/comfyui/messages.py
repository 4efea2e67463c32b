"""Notices of the server as messages of ComfyUI's WebSocket.

A message is a JSON object `{type, data}` or a binary frame, which begins with its type as a 32-bit big-endian number:
1, a picture; 3, a line of text for the running node; 4, a picture with metadata. Messages about a job go to the client
that submitted it; progress of a job without a client goes to all. Simple clients take every binary frame for a result,
so only clients that have sent feature flags receive any.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lorasmith.server.comfyui.job_views import ending_message, milliseconds
from lorasmith.server.hub import Notice
from lorasmith.server.jobs import ENDED, Job

Frame: TypeAlias = str | bytes  # JSON text, or a binary frame


@dataclass
class Client:
    """A client of the WebSocket."""

    id: str
    flags: Mapping[str, Any] | None = None  # feature flags; None until received
    reads_log: bool = False  # subscribed to the log

    @property
    def takes_binary(self) -> bool:
        return self.flags is not None

    @property
    def takes_metadata(self) -> bool:
        """Whether previews are sent with metadata."""
        return self.flags is not None and self.flags.get("supports_preview_metadata") is True


@dataclass
class JobProgress:
    """Progress of a running graph."""

    # value, maximum and state by node, in the protocol's form
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None  # id of a node
    has_previews: bool = True  # whether its client wants previews


class Progress:
    """Progress of graphs by job. Kept for the last jobs after their end, as clients may still read it."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobProgress] = {}

    def observe(self, notice: Notice) -> None:
        if notice.job_id is None:
            return
        if notice.kind == "job":
            if notice.data.get("state") in ENDED and notice.job_id in self._jobs:
                self._jobs[notice.job_id].running = None
            return
        if notice.kind == "graph":
            self._observe_event(notice.job_id, notice.data)

    def of(self, job_id: str) -> JobProgress:
        return self._jobs.get(job_id) or JobProgress()

    def _observe_event(self, job_id: str, data: Mapping[str, Any]) -> None:
        event, node = data.get("event"), str(data.get("node_id", ""))
        if event == "ExecutionStarted":
            self._jobs.pop(job_id, None)
        job = self._jobs.setdefault(job_id, JobProgress())
        while len(self._jobs) > _MOST_JOBS:
            del self._jobs[next(iter(self._jobs))]
        if event == "NodeStarted":
            job.running = node
            job.nodes[node] = _node_state(job_id, node, 0, 1, "running")
        elif event == "NodeProgress":
            job.nodes[node] = _node_state(job_id, node, data.get("value", 0), data.get("maximum", 1), "running")
        elif event in ("NodeFinished", "NodeCached"):
            last = job.nodes.pop(node, None)
            most = last["max"] if last else 1
            job.nodes[node] = _node_state(job_id, node, most, most, "finished")
            if job.running == node:
                job.running = None
        while len(job.nodes) > _MOST_STATES:  # drop the oldest: every message repeats all of them
            del job.nodes[next(iter(job.nodes))]


def log_entry(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the log in the protocol's form."""
    return {"t": line["t"], "m": f"{line['m']}\n"}


def message(kind: str, data: Mapping[str, Any]) -> str:
    """A message as JSON text."""
    return json.dumps({"type": kind, "data": data})


def queue_info(counts: Mapping[str, int]) -> dict[str, Any]:
    """The queue's state in `/prompt` and `status`, from the numbers of running and pending jobs."""
    return {"exec_info": {"queue_remaining": sum(counts.values())}}


def frames_of(notice: Notice, client: Client, progress: Progress) -> Iterator[Frame]:
    """The messages of a notice, which `progress` has observed; the end of a job is in `ending_frames`."""
    if notice.kind == "queue":
        yield message("status", {"status": queue_info(notice.data)})
    elif notice.kind == "log":
        if client.reads_log:
            yield message("logs", {"entries": [log_entry(notice.data)], "size": TERMINAL_SIZE})
    elif notice.kind == "training" and notice.job_id is not None:
        if notice.client_id in (None, client.id) and notice.data.get("node_id") is not None:
            yield message(TRAINING, {"prompt_id": notice.job_id, "node": notice.data["node_id"], **notice.data})
    elif notice.kind == "graph" and notice.job_id is not None:
        yield from _graph_frames(notice, notice.job_id, client, progress)


def ending_frames(job: Job, client: Client) -> Iterator[Frame]:
    """The messages that end a job; its history must be stored first."""
    ending = ending_message(job)
    if ending is None or job.started is None or job.kind != "graph":
        return
    name, data = ending
    if job.client_id == client.id or (name == "execution_interrupted" and job.client_id is None):
        yield message(name, data)


def final_frames(job: Job, client: Client) -> Iterator[Frame]:
    """The last message of a job, sent after the queue's new length."""
    if job.client_id == client.id and job.started is not None and job.kind == "graph":
        yield message("executing", {"node": None, "prompt_id": job.id})


def _graph_frames(notice: Notice, job_id: str, client: Client, progress: Progress) -> Iterator[Frame]:
    data, event, is_own = notice.data, notice.data.get("event"), notice.client_id == client.id
    node = str(data.get("node_id", ""))
    if not is_own and (notice.client_id is not None or event not in _FOR_ALL):
        return
    if event == "ExecutionStarted":
        stamp = {"prompt_id": job_id, "timestamp": milliseconds(time.time())}
        yield message("execution_start", stamp)
        yield message("execution_cached", {"nodes": list(data.get("cached", ())), **stamp})
    elif event == "NodeCached":
        if data.get("ui"):
            yield _executed(job_id, node, data["ui"])
    elif event == "NodeStarted":
        yield _progress_state(job_id, progress)
        if is_own:
            yield message("executing", {"node": node, "display_node": node, "prompt_id": job_id})
    elif event == "NodeProgress":
        yield from _progress_frames(notice, job_id, node, client, progress)
    elif event == "NodeFinished":
        if is_own and data.get("ui"):
            yield _executed(job_id, node, data["ui"])
        yield _progress_state(job_id, progress)


def _progress_frames(notice: Notice, job_id: str, node: str, client: Client, progress: Progress) -> Iterator[Frame]:
    data = notice.data
    numbers = {"value": data.get("value", 0), "max": data.get("maximum", 1)}
    yield message("progress", {**numbers, "prompt_id": job_id, "node": node})
    yield _progress_state(job_id, progress)
    if not client.takes_binary:
        return
    if data.get("text"):
        yield text_frame(node, str(data["text"]))
    if notice.binary and progress.of(job_id).has_previews:
        picture = notice.binary
        yield metadata_frame(job_id, node, picture) if client.takes_metadata else picture_frame(picture)


def picture_frame(picture: bytes) -> bytes:
    """A frame of type 1: the picture's format (1 JPEG, 2 PNG) and the picture."""
    return struct.pack(">II", 1, 2 if picture.startswith(_PNG) else 1) + picture


def text_frame(node: str, text: str) -> bytes:
    """A frame of type 3: a line of text that is shown under a node."""
    name = node.encode()
    return struct.pack(">II", 3, len(name)) + name + text.encode(errors="replace")


def metadata_frame(job_id: str, node: str, picture: bytes) -> bytes:
    """A frame of type 4: metadata as JSON, and a JPEG or PNG."""
    kind = "image/png" if picture.startswith(_PNG) else "image/jpeg"
    text = json.dumps({**_names(job_id, node), "image_type": kind}).encode()
    return struct.pack(">II", 4, len(text)) + text + picture


def _executed(job_id: str, node: str, ui: Mapping[str, Any]) -> str:
    return message("executed", {"node": node, "display_node": node, "output": ui, "prompt_id": job_id})


def _progress_state(job_id: str, progress: Progress) -> str:
    return message("progress_state", {"prompt_id": job_id, "nodes": progress.of(job_id).nodes})


def _node_state(job_id: str, node: str, value: float, most: float, state: str) -> dict[str, Any]:
    return {"value": value, "max": most, "state": state, **_names(job_id, node)}


def _names(job_id: str, node: str) -> dict[str, Any]:
    """A node's ids, which differ in ComfyUI only for nodes created during execution."""
    return {
        "node_id": node,
        "prompt_id": job_id,
        "display_node_id": node,
        "parent_node_id": None,
        "real_node_id": node,
    }


TRAINING = "lorasmith.training"  # type of messages about training events, an addition to the protocol
TERMINAL_SIZE = {"cols": 120, "rows": 40}  # in which the editor shows the log
_FOR_ALL = frozenset({"NodeStarted", "NodeProgress", "NodeFinished"})
"""Events of jobs without a client that are sent to all clients."""
_MOST_STATES, _MOST_JOBS = 256, 16
_PNG = b"\x89PNG"
