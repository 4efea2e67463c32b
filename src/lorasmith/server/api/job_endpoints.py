"""Endpoints about jobs, and about runs before they start: plans and measurements."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, cast

from lorasmith.core.errors import OptionError
from lorasmith.core.registry import nearest
from lorasmith.runs.queue import ACTIVE, ENDED, STATES, Job, JobState, JobStateError, measurement_subject
from lorasmith.server.access import is_loopback
from lorasmith.server.api.endpoint import Call, Endpoint, Query
from lorasmith.server.api.event_streams import all_events, job_events
from lorasmith.server.api.job_answers import job_answer
from lorasmith.server.api_shapes import (
    CancelBody,
    DatasetSource,
    JobAnswer,
    JobBody,
    JobList,
    MeasurementBody,
    MoveBody,
    PlanAnswer,
    PlanBody,
    RemovedJob,
)
from lorasmith.server.contained_files import OutsideError, contained
from lorasmith.server.request_handling import ServerContext

_MOST_LISTED = 500


async def _plan(context: ServerContext, call: Call) -> Any:
    body: PlanBody = call.body
    device = next(iter(context.dispatcher.devices()), {})
    plan = await context.assistant.ask(
        "plan",
        model=body.model,
        dataset=body.dataset,
        folder=folder_of_request(context, body),
        trigger=body.trigger,
        settings=body.settings,
        card_bytes=device.get("memory_bytes"),
    )
    subject = measurement_subject(body.model, body.settings, str(device.get("name", "cpu")))
    found = context.store.measurement(subject)
    if found is None:
        return plan
    seconds = found["seconds_per_step"]
    return {
        **plan,
        "seconds_per_step": seconds,
        "seconds": seconds * plan["steps"],
        "measured_at": found["measured_at"],
    }


async def _measure(context: ServerContext, call: Call) -> Any:
    request = await context.assistant.ask("check_measurement", model=call.body.model, settings=call.body.settings)
    return job_answer(context.dispatcher.submit("measure", request))


async def _jobs(context: ServerContext, call: Call) -> Any:
    states = _states(call.text("states"))
    limit, offset = call.number("limit", 100, least=1, most=_MOST_LISTED), call.number("offset", 0)
    active, ended = ([one for one in kinds if one in states] for kinds in (ACTIVE, ENDED))
    counts = context.store.counts()
    shown = context.store.active(limit, offset, active)
    if len(shown) < limit:
        before = sum(counts[state] for state in active)
        shown += context.store.ended(limit - len(shown), max(0, offset - before), ended)
    answers = tuple(job_answer(job) for job in shown)
    return {"jobs": answers, "total": sum(counts[state] for state in states)}


async def _add(context: ServerContext, call: Call) -> Any:
    body: JobBody = call.body
    given = {one.name: getattr(body, one.name) for one in dataclasses.fields(DatasetSource)}
    given["folder"] = folder_of_request(context, body)
    request = await context.assistant.ask("train_request", **given, name=body.name)
    return job_answer(context.dispatcher.submit("train", request, front=body.front))


async def _job(context: ServerContext, call: Call) -> Any:
    return job_answer(context.store.get(call.path("id")))


async def _remove(context: ServerContext, call: Call) -> Any:
    job = context.store.get(call.path("id"))
    if not context.dispatcher.remove([job.id]):
        raise JobStateError(f"a job that runs cannot be removed, and this one is {job.state}; cancel it first")
    return RemovedJob(id=job.id)


async def _cancel(context: ServerContext, call: Call) -> Any:
    job = context.store.get(call.path("id"))
    if not context.dispatcher.cancel(job.id, pause=call.body.pause):
        raise JobStateError(f"a job can be stopped while it waits or runs, and this one is {job.state}")
    return _answer(context, job)


async def _continue(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.proceed(call.path("id")))


async def _retry(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.retry(call.path("id")))


async def _move(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.move(call.path("id"), call.body.front))


def _answer(context: ServerContext, job: Job) -> Mapping[str, Any]:
    return job_answer(context.store.get(job.id))


def folder_of_request(context: ServerContext, body: DatasetSource) -> str | None:
    """The expanded folder of a request. On a server that others reach, it must be in the base folder (OptionError)."""
    config = context.config
    if body.folder is None:
        return None
    if is_loopback(config.host) and not config.names:
        return os.path.expanduser(body.folder)  # noqa: PTH111 - leaves the names of unknown users as they are
    try:
        return str(contained(config.base, body.folder))
    except OutsideError as error:
        raise OptionError(f"a folder must be named below the server's base folder, but {error}") from error


def _states(text: str) -> tuple[JobState, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STATES:
            raise OptionError(f"states must be of {', '.join(STATES)}, got {name[:40]!r}{nearest(name, STATES)}")
    return cast(tuple[JobState, ...], tuple(dict.fromkeys(names)) or STATES)


JOB_ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/plans",
        summary="The plan of a run: steps, memory, and its time if a step was measured.",
        handler=_plan,
        body=PlanBody,
        answer=PlanAnswer,
    ),
    Endpoint(
        method="POST",
        path="/measurements",
        summary="Queue a job that measures a step on this device; later plans have its time.",
        handler=_measure,
        body=MeasurementBody,
        answer=JobAnswer,
        status=201,
    ),
    Endpoint(
        method="GET",
        path="/jobs",
        summary="Jobs: those that run, those that wait, then those that ended, the last first.",
        handler=_jobs,
        query=(
            Query("states", "States of jobs, separated by commas; all without it."),
            Query("limit", "Number of jobs, at most 500.", "integer"),
            Query("offset", "Number of jobs to leave out.", "integer"),
        ),
        answer=JobList,
    ),
    Endpoint(
        method="POST",
        path="/jobs",
        summary="Queue a job that trains.",
        handler=_add,
        body=JobBody,
        answer=JobAnswer,
        status=201,
    ),
    Endpoint(method="GET", path="/jobs/{id}", summary="A job.", handler=_job, answer=JobAnswer),
    Endpoint(
        method="DELETE",
        path="/jobs/{id}",
        summary="Remove a job from queue or history; its run stays.",
        handler=_remove,
        answer=RemovedJob,
    ),
    Endpoint(
        method="POST",
        path="/jobs/{id}/cancel",
        summary="Stop a job, for good or to be continued; what it has trained is saved.",
        handler=_cancel,
        body=CancelBody,
        answer=JobAnswer,
    ),
    Endpoint(
        method="POST",
        path="/jobs/{id}/continue",
        summary="Continue a job that is paused, interrupted or cancelled.",
        handler=_continue,
        answer=JobAnswer,
    ),
    Endpoint(
        method="POST",
        path="/jobs/{id}/retry",
        summary="Queue a new job with the request of an ended one.",
        handler=_retry,
        answer=JobAnswer,
        status=201,
    ),
    Endpoint(
        method="POST",
        path="/jobs/{id}/move",
        summary="Move a waiting job to the front or the end.",
        handler=_move,
        body=MoveBody,
        answer=JobAnswer,
    ),
    Endpoint(
        method="GET",
        path="/events",
        summary="Every change of a job, and of the queue.",
        handler=all_events,
        content="text/event-stream",
    ),
    Endpoint(
        method="GET",
        path="/jobs/{id}/events",
        summary="A job: its changes, its preparation, and the events of its run.",
        handler=job_events,
        query=(Query("after", "Id of the last event that is known, in place of Last-Event-ID."),),
        content="text/event-stream",
    ),
)
