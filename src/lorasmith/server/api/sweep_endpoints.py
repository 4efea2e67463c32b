"""Endpoints about sweeps: those of the command line, and those that the server queues."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorasmith.server.api.endpoint import Call, Endpoint
from lorasmith.server.api.job_endpoints import folder_of_request
from lorasmith.server.api_shapes import DatasetSource
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.sweep_shapes import SweepAnswer, SweepBody, SweepList


async def _sweeps(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("sweeps", queued=context.store.sweeps())


async def _sweep(context: ServerContext, call: Call) -> Any:
    return await _answer(context, call.path("id"))


async def _add(context: ServerContext, call: Call) -> Any:
    body: SweepBody = call.body
    given = {one.name: getattr(body, one.name) for one in dataclasses.fields(DatasetSource)}
    given["folder"] = folder_of_request(context, body)
    found = await context.assistant.ask("sweep_requests", **given, name=body.name, grid=body.grid)
    for one in found["jobs"]:
        context.dispatcher.submit("train", one["request"], sweep=found["id"], varied=one["varied"])
    return await _answer(context, found["id"])


async def _answer(context: ServerContext, id: str) -> Any:
    queued = [
        {"request": job.request, "varied": job.varied, "failure": job.failure} for job in context.store.of_sweep(id)
    ]
    return await context.assistant.ask("sweep", id=id, queued=queued)


SWEEP_ENDPOINTS = (
    Endpoint(
        method="GET", path="/sweeps", summary="All sweeps below the base folder.", handler=_sweeps, answer=SweepList
    ),
    Endpoint(
        method="POST",
        path="/sweeps",
        summary="Queue a run for each combination of values.",
        handler=_add,
        body=SweepBody,
        answer=SweepAnswer,
        status=201,
    ),
    Endpoint(
        method="GET",
        path="/sweeps/{id}",
        summary="A sweep with the results of its runs, the best first.",
        handler=_sweep,
        answer=SweepAnswer,
    ),
)
