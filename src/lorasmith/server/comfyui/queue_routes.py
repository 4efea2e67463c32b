"""Graphs: definitions of nodes, checking and queueing of prompts; the queue, the history and `/jobs`.

An addition to ComfyUI's `POST /prompt`: `{"workflow": {...}}` in place of `prompt`, or a `prompt` in the format in
which the editor saves files, is converted first. `POST /workflow/convert` only converts it.

Trainings queued by the page are listed too, with an empty prompt, as they occupy the device, and can be cancelled by
id. `clear` does not affect them, since a client means its own jobs. Paused and interrupted jobs are shown as cancelled:
the protocol has no state for jobs that can be continued.
"""

from __future__ import annotations

import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.runs.queue import ENDED, DuplicateJobError, Job, JobState, JobStore, QueueFullError
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.job_reporter import error_entry
from lorasmith.server.request_handling import (
    ServerContext,
    number_in,
    read_json,
    read_object,
    refused,
    send_json_pieces,
    table,
)


class QueueRoutes:
    """The routes."""

    def __init__(self, context: ServerContext) -> None:
        self._assistant = context.assistant
        self._store = context.store
        self._entries = _Entries(context.store)
        self._dispatcher = context.dispatcher

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/object_info", self._definitions),
                ("GET", "/object_info/{node}", self._definitions),
                ("GET", "/prompt", self._queue_info),
                ("POST", "/prompt", self._queue_prompt),
                ("POST", "/workflow/convert", self._convert),
                ("GET", "/queue", self._queue),
                ("POST", "/queue", self._change_queue),
                ("GET", "/history", self._history),
                ("POST", "/history", self._change_history),
                ("GET", "/history/{id}", self._history_of),
                ("GET", "/jobs", self._jobs),
                ("POST", "/jobs/cancel", self._cancel_jobs),
                ("GET", "/jobs/{id}", self._job),
                ("POST", "/jobs/{id}/cancel", self._cancel_job),
                ("POST", "/interrupt", self._interrupt),
                ("POST", "/free", self._free),
            ]
        )

    async def _definitions(self, request: web.Request) -> web.Response:
        node = request.match_info.get("node")
        text = await self._assistant.ask("object_info", **({"node": node} if node else {}))
        return web.Response(body=text, content_type="application/json")

    async def _queue_info(self, request: web.Request) -> web.Response:
        return web.json_response(queue_info(self._store.queue_counts()))

    async def _convert(self, request: web.Request) -> web.Response:
        workflow = await read_object(request)
        inner = workflow.get("workflow")
        return web.json_response(await self._prompt_of(inner if isinstance(inner, dict) else workflow))

    async def _queue_prompt(self, request: web.Request) -> web.Response:
        from lorasmith.workflow.editor_graph import is_editor_format  # imported late, to start fast

        body = await read_object(request)
        fault = _fault_of(body)
        if fault is not None:
            return _refusal(fault)
        prompt, workflow = body.get("prompt"), body.get("workflow")
        if is_editor_format(prompt):
            prompt, workflow = None, prompt
        if prompt is None:
            try:
                prompt = await self._prompt_of(workflow)
            except RefusedError as error:
                return _refusal(error_entry("invalid_prompt", error.message))
        targets = body.get("partial_execution_targets")
        arguments: dict[str, Any] = {} if targets is None else {"targets": [str(target) for target in targets]}
        if any(isinstance(node, dict) and node.get("class_type") is None for node in prompt.values()):
            arguments["workflow"] = workflow or ((body.get("extra_data") or {}).get("extra_pnginfo") or {}).get(
                "workflow"
            )
        found = await self._assistant.ask("check_prompt", prompt=prompt, **arguments)
        if found["error"] is not None:
            return _refusal(found["error"], found["node_errors"])
        return await self._submit(body, prompt, workflow, found)

    async def _submit(
        self, body: Mapping[str, Any], prompt: dict[str, Any], workflow: Any, checked: Mapping[str, Any]
    ) -> web.Response:
        extra = dict(body.get("extra_data") or {})
        for name in _SECRETS:
            extra.pop(name, None)
        client = body.get("client_id")
        if client is not None:
            extra["client_id"] = client = str(client)
        pictures = extra.get("extra_pnginfo")
        if workflow is not None:
            pictures = extra["extra_pnginfo"] = {"workflow": workflow, **(pictures or {})}
        request = {
            "prompt": prompt,
            "extra_data": extra,
            "targets": body.get("partial_execution_targets"),
            "outputs_to_execute": checked["outputs"],
            "workflow": pictures.get("workflow") if isinstance(pictures, dict) else None,
        }
        number = body.get("number")
        try:
            job = self._dispatcher.submit(
                "graph",
                request,
                id=body.get("prompt_id"),
                client_id=client,
                front=bool(body.get("front", False)),
                number=None if number is None else float(number),
            )
        except QueueFullError as error:
            return _refusal(error_entry("queue_full", str(error)), status=429)
        except DuplicateJobError as error:
            return _refusal(error_entry("invalid_prompt_id", str(error)))
        answer = {"prompt_id": job.id, "number": job.number, "node_errors": checked["node_errors"]}
        return web.json_response(answer)

    async def _prompt_of(self, workflow: Any) -> dict[str, Any]:
        found = await self._assistant.ask("prompt_of_workflow", workflow=workflow)
        return dict(found)

    async def _queue(self, request: web.Request) -> web.StreamResponse:
        running, pending = (self._entries.texts(self._store.lines([state])) for state in ("running", "pending"))
        pieces = chain(['{"queue_running": ['], running, ['], "queue_pending": ['], pending, ["]}"])
        return await send_json_pieces(request, pieces)

    async def _change_queue(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        ids, is_all = set(_ids_in(body)), bool(body.get("clear"))
        waiting = [
            line for line in self._store.lines(["pending"]) if line.id in ids or (is_all and line.kind == "graph")
        ]
        # Graphs leave no history entry, as in ComfyUI; all are removed in one call, as there may be thousands.
        self._dispatcher.remove([job.id for job in waiting if job.kind == "graph"])
        for job in waiting:
            if job.kind != "graph":
                self._dispatcher.cancel(job.id)
        return web.Response()

    async def _history(self, request: web.Request) -> web.StreamResponse:
        most, offset = number_in(request, "max_items"), number_in(request, "offset", at_least=-1)
        lines = self._ended_graphs()
        if offset is not None and offset >= 0:
            lines = lines[offset : None if most is None else offset + most]
        elif most is not None:
            lines = lines[max(0, len(lines) - most) :]
        jobs = (job for line in lines if (job := self._store.find(line.id)) is not None)
        entries = (f"{json.dumps(job.id)}: {json.dumps(history_entry(job))}" for job in jobs)
        return await send_json_pieces(request, chain(["{"], _separated(entries), ["}"]))

    def _ended_graphs(self) -> list[Job]:
        """Oldest first."""
        lines = [line for line in self._store.lines(ENDED) if line.kind == "graph"]
        return sorted(lines, key=lambda line: line.ended or 0.0)

    async def _history_of(self, request: web.Request) -> web.Response:
        job = self._store.find(request.match_info["id"])
        is_there = job is not None and job.kind == "graph" and job.state in ENDED
        return web.json_response({job.id: history_entry(job)} if job is not None and is_there else {})

    async def _change_history(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        ids, is_all = set(_ids_in(body)), bool(body.get("clear"))
        ended = [line for line in self._store.lines(ENDED) if line.id in ids or (is_all and line.kind == "graph")]
        self._dispatcher.remove([job.id for job in ended])
        return web.Response()

    async def _jobs(self, request: web.Request) -> web.Response:
        query = request.query
        statuses = [status.strip().casefold() for status in query.get("status", "").split(",") if status.strip()]
        if unknown := [statuse for statuse in statuses if statuse not in STATES_OF_STATUS]:
            known = ", ".join(STATES_OF_STATUS)
            return refused(400, f"status must be among {known}, got {', '.join(unknown)[:100]!r}")
        sort, order = query.get("sort_by", "created_at").casefold(), query.get("sort_order", "desc").casefold()
        if sort not in _SORTED_BY or order not in ("asc", "desc"):
            return refused(400, f"sort_by must be {' or '.join(_SORTED_BY)}, and sort_order asc or desc")
        limit, offset = (
            number_in(request, "limit", at_least=1),
            max(0, number_in(request, "offset", at_least=-(10**9)) or 0),
        )
        states = [state for statuse in statuses or STATES_OF_STATUS for state in STATES_OF_STATUS[statuse]]
        lines = sorted(self._store.lines(states), key=_SORTED_BY[sort], reverse=order == "desc")
        if (workflow := query.get("workflow_id")) is not None:
            lines = [line for line in lines if self._summary(line).get("workflow_id") == workflow]
        shown = lines[offset : None if limit is None else offset + limit]
        page = {"offset": offset, "limit": limit, "total": len(lines), "has_more": offset + len(shown) < len(lines)}
        jobs = [summary for line in shown if (summary := self._summary(line))]
        return web.json_response({"jobs": jobs, "pagination": page})

    def _summary(self, line: Job) -> dict[str, Any]:
        """A job of the list; empty if it has been removed."""
        job = self._store.find(line.id)
        return {} if job is None else job_summary(job)

    async def _job(self, request: web.Request) -> web.Response:
        job = self._store.find(request.match_info["id"])
        return refused(404, "there is no such job") if job is None else web.json_response(job_detail(job))

    async def _cancel_job(self, request: web.Request) -> web.Response:
        return web.json_response({"cancelled": self._cancel(request.match_info["id"])})

    async def _cancel_jobs(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        ids = body.get("job_ids")
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            return refused(400, "job_ids must be a list of ids")
        cancelled = [self._cancel(id) for id in ids]
        return web.json_response({"cancelled": any(cancelled)})

    async def _interrupt(self, request: web.Request) -> web.Response:
        body = await read_json(request, empty={})
        id = body.get("prompt_id") if isinstance(body, dict) else None
        if not id:
            self._dispatcher.interrupt()
        elif isinstance(id, str) and (job := self._store.find(id)) is not None and job.state == "running":
            self._dispatcher.cancel(id)
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        body = await read_object(request, empty={})
        models, memory = bool(body.get("unload_models")), bool(body.get("free_memory"))
        self._dispatcher.free(unload_models=models, free_memory=memory)
        return web.Response()

    def _cancel(self, id: str) -> bool:
        job = self._store.find(id)
        return job is not None and job.state in ("pending", "running") and self._dispatcher.cancel(id)


def _fault_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The error of a malformed request; the prompt itself is checked later."""
    prompt, workflow, id, number = (body.get(key) for key in ("prompt", "workflow", "prompt_id", "number"))
    if not isinstance(prompt, dict) and (prompt is not None or not isinstance(workflow, dict)):
        return error_entry("no_prompt", "a request must have a prompt, an object of nodes; add one")
    if id is not None and not _is_uuid(id):
        message = "prompt_id must be a UUID in lower case with hyphens; leave it out for a new one"
        return error_entry("invalid_prompt_id", message)
    if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
        return error_entry("invalid_prompt", "number must be a number; leave it out for the next one")
    targets = body.get("partial_execution_targets")
    if targets is not None and not (
        isinstance(targets, list) and all(isinstance(target, (str, int)) for target in targets)
    ):
        return error_entry("invalid_prompt", "partial_execution_targets must be a list of ids of nodes")
    extra = body.get("extra_data")
    if extra is not None and not isinstance(extra, dict):
        return error_entry("invalid_prompt", "extra_data must be an object; leave it out")
    if extra and extra.get("extra_pnginfo") is not None and not isinstance(extra["extra_pnginfo"], dict):
        return error_entry("invalid_prompt", "extra_pnginfo must be an object; leave it out")
    return None


def _is_uuid(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) == _UUID_LENGTH and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def _refusal(
    error: Mapping[str, Any], node_errors: Mapping[str, Any] | None = None, *, status: int = 400
) -> web.Response:
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=status)


_UUID_LENGTH = 36
_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
"""Keys of other services, which the editor sends; they are not stored."""


def queue_info(counts: Mapping[str, int]) -> dict[str, Any]:
    """The queue's state in `/prompt` and `status`, from the numbers of running and pending jobs."""
    return {"exec_info": {"queue_remaining": sum(counts.values())}}


def _separated(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield f", {text}" if number else text


def _ids_in(body: dict[str, Any]) -> list[str]:
    ids = body.get("delete", [])
    if not isinstance(ids, list):
        raise OptionError("delete must be a list of ids")
    return [id for id in ids if isinstance(id, str)]


class _Entries:
    """A cache of queue entries as JSON text, limited in size: clients read all of them at every change."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._size = 0

    def texts(self, lines: Sequence[Job]) -> Iterator[str]:
        """The entries of jobs, separated by commas; removed jobs are skipped."""
        # Moving a job changes only its number; the rest of its entry is constant.
        return _separated(f"[{json.dumps(line.number)}, {rest}" for line in lines if (rest := self._rest(line.id)))

    def _rest(self, id: str) -> str:
        if (kept := self._kept.get(id)) is not None:
            self._kept.move_to_end(id)
            return kept
        job = self._store.find(id)
        if job is None:
            return ""
        text = json.dumps(queue_entry(job)[1:])[1:]
        self._kept[id] = text
        self._size += len(text)
        while self._size > _MOST_KEPT:
            self._size -= len(self._kept.popitem(last=False)[1])
        return text


_MOST_KEPT = 32 * 2**20
_SORTED_BY: dict[str, Callable[[Job], float]] = {
    "created_at": lambda line: line.created,
    "execution_duration": lambda line: line.ended - line.started if line.ended and line.started else 0.0,
}


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
    messages = [list(message) for message in job.messages]
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
    saved = [output for output in shown if output[2].get("type") == "output"]
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
