"""Notices of the server as messages of ComfyUI's WebSocket.

A message is a JSON object `{type, data}` or a binary frame, which begins with its kind as a 32-bit big-endian number:
1, a picture; 3, a line of text for the running node; 4, a picture with metadata. Messages about a job go to the client
that submitted it; progress of a job without a client goes to all. Simple clients take every binary frame for a result,
so only those that have sent their feature flags get any.
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

Frame: TypeAlias = str | bytes
"""A message as it is sent: JSON text, or a binary frame."""


@dataclass
class Client:
    """A client of the WebSocket.

    Attributes:
        id: of its session.
        flags: its feature flags; None until it has sent them.
        reads_log: whether it has subscribed to the log.
    """

    id: str
    flags: Mapping[str, Any] | None = None
    reads_log: bool = False

    @property
    def takes_binary(self) -> bool:
        """Whether binary frames may be sent."""
        return self.flags is not None

    @property
    def takes_metadata(self) -> bool:
        """Whether previews are sent with metadata."""
        return self.flags is not None and self.flags.get("supports_preview_metadata") is True


@dataclass
class JobProgress:
    """Progress of a running graph.

    Attributes:
        nodes: value, maximum and state of each node that has started, in the protocol's form.
        running: id of the running node.
        has_previews: whether its client wants previews.
    """

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None
    has_previews: bool = True


class Progress:
    """Progress of graphs by job, from their notices.

    Those of the last jobs are kept, as clients may read of a job when it has ended.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, JobProgress] = {}

    def observe(self, notice: Notice) -> None:
        """Keep what a notice says."""
        if notice.job_id is None:
            return
        if notice.kind == "job":
            if notice.data.get("state") in ENDED and notice.job_id in self._jobs:
                self._jobs[notice.job_id].running = None
            return
        if notice.kind == "graph":
            self._observe_event(notice.job_id, notice.data)

    def of(self, job_id: str) -> JobProgress:
        """The progress of a job."""
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
        while len(job.nodes) > _MOST_STATES:  # the oldest; a graph of thousands of nodes would send each of them often
            del job.nodes[next(iter(job.nodes))]


def log_entry(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the log as clients write it into a terminal."""
    return {"t": line["t"], "m": f"{line['m']}\n"}


def message(kind: str, data: Mapping[str, Any]) -> str:
    """A message as JSON text."""
    return json.dumps({"type": kind, "data": data})


def queue_info(counts: Mapping[str, int]) -> dict[str, Any]:
    """What `/prompt` and `status` say of the queue, from the numbers of jobs that run and that wait."""
    return {"exec_info": {"queue_remaining": sum(counts.values())}}


def frames_of(notice: Notice, client: Client, progress: Progress) -> Iterator[Frame]:
    """What a notice is for a client, except the end of a job (`ending_frames`).

    Args:
        notice: of the hub.
        client: who gets it.
        progress: has observed the notice.
    """
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
    """What the end of a job is for a client; its history must have been written before."""
    ending = ending_message(job)
    if ending is None or job.started is None or job.kind != "graph":
        return
    name, data = ending
    if job.client_id == client.id or (name == "execution_interrupted" and job.client_id is None):
        yield message(name, data)


def final_frames(job: Job, client: Client) -> Iterator[Frame]:
    """The last message of a job, which follows its end and the queue's new length."""
    if job.client_id == client.id and job.started is not None and job.kind == "graph":
        yield message("executing", {"node": None, "prompt_id": job.id})


def _graph_frames(notice: Notice, job_id: str, client: Client, progress: Progress) -> Iterator[Frame]:
    """An event of an executor."""
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
    """A frame of kind 1: the picture's type (1 JPEG, 2 PNG) and the picture."""
    return struct.pack(">II", 1, 2 if picture.startswith(_PNG) else 1) + picture


def text_frame(node: str, text: str) -> bytes:
    """A frame of kind 3: a line of text that is shown under a node."""
    name = node.encode()
    return struct.pack(">II", 3, len(name)) + name + text.encode(errors="replace")


def metadata_frame(job_id: str, node: str, picture: bytes) -> bytes:
    """A frame of kind 4: metadata as JSON, and the picture.

    Args:
        job_id: of the running job.
        node: id of the running node.
        picture: JPEG or PNG.
    """
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
    """The ids of a node, which differ in ComfyUI for nodes that others create while running."""
    return {
        "node_id": node,
        "prompt_id": job_id,
        "display_node_id": node,
        "parent_node_id": None,
        "real_node_id": node,
    }


TRAINING = "lorasmith.training"
"""Type of the messages about events of a training, which the protocol does not know."""
TERMINAL_SIZE = {"cols": 120, "rows": 40}
"""Of the terminal in which the editor shows the log."""
_FOR_ALL = frozenset({"NodeStarted", "NodeProgress", "NodeFinished"})
"""Events of jobs without a client that all clients get, as progress."""
_MOST_STATES, _MOST_JOBS = 256, 16
_PNG = b"\x89PNG"
