"""The queue, the history and `/jobs`.

Trainings that the page has queued are listed too, as they occupy the device, and can be cancelled by their id.
`clear` leaves them alone: a client that clears its queue does not mean the work of another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, get_args

from aiohttp import web

from lorasmith.server.comfyui.answers import number_in, read_json, refused, table
from lorasmith.server.comfyui.job_views import STATES_OF_STATUS, history_entry, job_detail, job_summary, queue_entry
from lorasmith.server.jobs import ENDED, Job, JobState
from lorasmith.server.server_context import ServerContext

__all__ = ["QueueRoutes"]

MOST_LISTED = 10_000
"""Ended jobs in one answer."""


class QueueRoutes:
    """The routes. Args: `context` of the server."""

    def __init__(self, context: ServerContext) -> None:
        self._store = context.store
        self._dispatcher = context.dispatcher

    def routes(self) -> list[web.RouteDef]:
        """All routes."""
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

    async def _queue(self, request: web.Request) -> web.Response:
        running, pending = self._store.running(), self._store.pending()
        return web.json_response(
            {"queue_running": [*map(queue_entry, running)], "queue_pending": [*map(queue_entry, pending)]}
        )

    async def _change_queue(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
        ids = _ids_in(body)
        if body.get("clear"):
            ids += [job.id for job in self._store.pending() if job.kind == "graph"]
        for id in dict.fromkeys(ids):
            self._dequeue(id)
        return web.Response()

    async def _history(self, request: web.Request) -> web.Response:
        most, offset = number_in(request, "max_items"), number_in(request, "offset", at_least=-1)
        jobs = self._graphs(most, offset)
        return web.json_response({job.id: history_entry(job) for job in jobs})

    def _graphs(self, most: int | None, offset: int | None) -> list[Job]:
        """Ended graphs, the oldest first: the last `most`, or from `offset` on, counted from the oldest."""
        if offset is not None and offset >= 0:
            found = [job for job in self._store.ended(newest=False) if job.kind == "graph"]
            return found[offset:] if most is None else found[offset : offset + most]
        if most is None:
            return [job for job in self._store.ended(newest=False) if job.kind == "graph"]
        found = []
        for start in range(0, MOST_LISTED, _PAGE):
            page = self._store.ended(_PAGE, start)
            found += [job for job in page if job.kind == "graph"]
            if len(found) >= most or len(page) < _PAGE:
                break
        return found[:most][::-1]

    async def _history_of(self, request: web.Request) -> web.Response:
        job = self._store.find(request.match_info["id"])
        is_there = job is not None and job.kind == "graph" and job.state in ENDED
        return web.json_response({job.id: history_entry(job)} if job is not None and is_there else {})

    async def _change_history(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
        ended = set(_ids_in(body))
        if body.get("clear"):
            ended |= {job.id for job in self._store.ended() if job.kind == "graph"}
        self._dispatcher.remove(
            [id for id in ended if (job := self._store.find(id)) is not None and job.state in ENDED]
        )
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
        jobs = self._in_states([state for one in statuses or STATES_OF_STATUS for state in STATES_OF_STATUS[one]])
        if (workflow := query.get("workflow_id")) is not None:
            jobs = [job for job in jobs if job_summary(job).get("workflow_id") == workflow]
        jobs.sort(key=_SORTED_BY[sort], reverse=order == "desc")
        shown = jobs[offset : None if limit is None else offset + limit]
        page = {"offset": offset, "limit": limit, "total": len(jobs), "has_more": offset + len(shown) < len(jobs)}
        return web.json_response({"jobs": [*map(job_summary, shown)], "pagination": page})

    def _in_states(self, states: Collection[str]) -> list[Job]:
        found = self._store.running() if "running" in states else []
        found += self._store.pending() if "pending" in states else []
        ended: Sequence[JobState] = [state for state in get_args(JobState) if state in states and state in ENDED]
        return found + (self._store.ended(MOST_LISTED, states=ended) if ended else [])

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

    def _dequeue(self, id: str) -> None:
        """Give up a waiting job; a graph leaves no entry, as in ComfyUI. One that runs stays."""
        job = self._store.find(id)
        if job is not None and job.state == "pending":
            self._dispatcher.cancel(id)
            if job.kind == "graph":
                self._dispatcher.remove([id])

    def _cancel(self, id: str) -> bool:
        job = self._store.find(id)
        return job is not None and job.state in ("pending", "running") and self._dispatcher.cancel(id)


def _ids_in(body: dict[str, Any]) -> list[str]:
    ids = body.get("delete", [])
    if not isinstance(ids, list):
        raise web.HTTPBadRequest(text='{"error": "delete must be a list of ids"}', content_type="application/json")
    return [id for id in ids if isinstance(id, str)]


_PAGE = 200
_SORTED_BY: dict[str, Callable[[Job], float]] = {
    "created_at": lambda job: job.created,
    "execution_duration": lambda job: (job.ended or 0) - (job.started or 0) if job.ended and job.started else 0,
}
