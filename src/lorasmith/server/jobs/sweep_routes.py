"""Endpoints about sweeps: those of the command line, and those that the server queues."""

from __future__ import annotations

from typing import Any

from lorasmith.server.endpoint import Call, Endpoint
from lorasmith.server.jobs.job_routes import wanted_spec
from lorasmith.server.jobs.job_shapes import SweepAnswer, SweepBody, SweepList
from lorasmith.server.request_handling import ServerContext


async def _sweeps(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("sweeps", queued=context.store.sweeps())


async def _sweep(context: ServerContext, call: Call) -> Any:
    return await _answer(context, call.path("id"))


async def _add(context: ServerContext, call: Call) -> Any:
    spec = await wanted_spec(context, call.body)
    found = await context.assistant.ask("sweep_requests", spec=spec.to_request(), grid=call.body.grid)
    for one in found["jobs"]:
        context.dispatcher.submit("train", one["request"], sweep=found["id"], varied=one["varied"])
    return await _answer(context, found["id"])


async def _answer(context: ServerContext, id: str) -> Any:
    queued = [
        {"request": job.request, "varied": job.varied, "failure": job.failure} for job in context.store.of_sweep(id)
    ]
    return await context.assistant.ask("sweep", id=id, queued=queued)


SWEEP_ROUTES = (
    Endpoint("GET", "/sweeps", "All sweeps below the base folder.", handler=_sweeps, answer=SweepList),
    Endpoint(
        "POST",
        "/sweeps",
        "Queue a run for each combination of values.",
        handler=_add,
        body=SweepBody,
        answer=SweepAnswer,
        status=201,
    ),
    Endpoint(
        "GET",
        "/sweeps/{id}",
        "A sweep with the results of its runs, the best first.",
        handler=_sweep,
        answer=SweepAnswer,
    ),
)
