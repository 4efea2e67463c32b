"""The queue, the history and `/jobs`.

Trainings queued by the page are listed too, as they occupy the device, and can be cancelled by id. `clear` does not
affect them, since a client means its own jobs.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.server.comfyui.answers import read_json, refused, table
from lorasmith.server.comfyui.job_views import STATES_OF_STATUS, history_entry, job_detail, job_summary, queue_entry
from lorasmith.server.jobs import ENDED, JobLine, JobStore
from lorasmith.server.request_handling import ServerContext, number_in, send_json_pieces


class QueueRoutes:
    """The routes."""

    def __init__(self, context: ServerContext) -> None:
        self._store = context.store
        self._entries = _Entries(context.store)
        self._dispatcher = context.dispatcher

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
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

    async def _queue(self, request: web.Request) -> web.StreamResponse:
        running, pending = (self._entries.texts(self._store.lines([state])) for state in ("running", "pending"))
        pieces = chain(['{"queue_running": ['], running, ['], "queue_pending": ['], pending, ["]}"])
        return await send_json_pieces(request, pieces)

    async def _change_queue(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
        ids, is_all = set(_ids_in(body)), bool(body.get("clear"))
        waiting = [one for one in self._store.lines(["pending"]) if one.id in ids or (is_all and one.kind == "graph")]
        # Graphs leave no history entry, as in ComfyUI; all are removed in one call, as there may be thousands.
        self._dispatcher.remove([one.id for one in waiting if one.kind == "graph"])
        for one in waiting:
            if one.kind != "graph":
                self._dispatcher.cancel(one.id)
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

    def _ended_graphs(self) -> list[JobLine]:
        """Oldest first."""
        lines = [line for line in self._store.lines(ENDED) if line.kind == "graph"]
        return sorted(lines, key=lambda line: line.ended or 0.0)

    async def _history_of(self, request: web.Request) -> web.Response:
        job = self._store.find(request.match_info["id"])
        is_there = job is not None and job.kind == "graph" and job.state in ENDED
        return web.json_response({job.id: history_entry(job)} if job is not None and is_there else {})

    async def _change_history(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
        ids, is_all = set(_ids_in(body)), bool(body.get("clear"))
        ended = [one for one in self._store.lines(ENDED) if one.id in ids or (is_all and one.kind == "graph")]
        self._dispatcher.remove([one.id for one in ended])
        return web.Response()

    async def _jobs(self, request: web.Request) -> web.Response:
        query = request.query
        statuses = [one.strip().casefold() for one in query.get("status", "").split(",") if one.strip()]
        if unknown := [one for one in statuses if one not in STATES_OF_STATUS]:
            known = ", ".join(STATES_OF_STATUS)
            return refused(400, f"status must be among {known}, got {', '.join(unknown)[:100]!r}")
        sort, order = query.get("sort_by", "created_at").casefold(), query.get("sort_order", "desc").casefold()
        if sort not in _SORTED_BY or order not in ("asc", "desc"):
            return refused(400, f"sort_by must be {' or '.join(_SORTED_BY)}, and sort_order asc or desc")
        limit, offset = (
            number_in(request, "limit", at_least=1),
            max(0, number_in(request, "offset", at_least=-(10**9)) or 0),
        )
        states = [state for one in statuses or STATES_OF_STATUS for state in STATES_OF_STATUS[one]]
        lines = sorted(self._store.lines(states), key=_SORTED_BY[sort], reverse=order == "desc")
        if (workflow := query.get("workflow_id")) is not None:
            lines = [line for line in lines if self._summary(line).get("workflow_id") == workflow]
        shown = lines[offset : None if limit is None else offset + limit]
        page = {"offset": offset, "limit": limit, "total": len(lines), "has_more": offset + len(shown) < len(lines)}
        jobs = [summary for line in shown if (summary := self._summary(line))]
        return web.json_response({"jobs": jobs, "pagination": page})

    def _summary(self, line: JobLine) -> dict[str, Any]:
        """A job of the list; empty if it has been removed."""
        job = self._store.find(line.id)
        return {} if job is None else job_summary(job)

    async def _job(self, request: web.Request) -> web.Response:
        job = self._store.find(request.match_info["id"])
        return refused(404, "there is no such job") if job is None else web.json_response(job_detail(job))

    async def _cancel_job(self, request: web.Request) -> web.Response:
        return web.json_response({"cancelled": self._cancel(request.match_info["id"])})

    async def _cancel_jobs(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
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
        body = await read_json(request, kind=dict, empty={})
        models, memory = bool(body.get("unload_models")), bool(body.get("free_memory"))
        self._dispatcher.free(unload_models=models, free_memory=memory)
        return web.Response()

    def _cancel(self, id: str) -> bool:
        job = self._store.find(id)
        return job is not None and job.state in ("pending", "running") and self._dispatcher.cancel(id)


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

    def texts(self, lines: Sequence[JobLine]) -> Iterator[str]:
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
_SORTED_BY: dict[str, Callable[[JobLine], float]] = {
    "created_at": lambda line: line.created,
    "execution_duration": lambda line: line.ended - line.started if line.ended and line.started else 0.0,
}
