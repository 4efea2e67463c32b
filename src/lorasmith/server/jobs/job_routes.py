"""Endpoints about jobs, sweeps, and runs before they start: plans and measurements."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import Any, cast
from urllib.parse import unquote

from lorasmith.core.errors import DataError, OptionError, OutputError
from lorasmith.core.files import is_folder
from lorasmith.core.folders import Folders, safe_name
from lorasmith.core.printable import printable
from lorasmith.core.registry import nearest
from lorasmith.core.stores import is_url
from lorasmith.core.typed_json import json_values
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import known_model
from lorasmith.runs.presets import run_s
from lorasmith.runs.queue import ACTIVE, ENDED, STATES, JobState, JobStateError, measurement_subject
from lorasmith.runs.spec import RunSpec
from lorasmith.server.access import serves_others
from lorasmith.server.contained_files import OutsideError, contained
from lorasmith.server.datasets.dataset_folders import dataset_folder
from lorasmith.server.endpoint import Call, Endpoint, Query, json_response
from lorasmith.server.event_streams import all_events, job_events
from lorasmith.server.jobs.job_rows import job_answer
from lorasmith.server.jobs.job_shapes import (
    CancelBody,
    JobAnswer,
    JobBody,
    JobList,
    MeasurementBody,
    MoveBody,
    PlanAnswer,
    PlanBody,
    RemovedJob,
    SweepAnswer,
    SweepBody,
    SweepList,
)
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.server_config import ServerConfig
from lorasmith.training.config import TrainConfig

_MOST_LISTED = 500
_LONGEST_KEY, _MOST_PRIORITY = 200, 100


async def _plan(context: ServerContext, call: Call) -> Any:
    device = context.dispatcher.device()
    spec = await wanted_spec(context, call.body)
    plan = await context.assistant.ask(
        "plan", spec=spec.to_request(), card_bytes=device.get("memory_bytes"), device=device.get("name")
    )
    settings = {**plan["memory_settings"], **plan["recipe"], **call.body.settings}  # as it is trained, and was measured
    subject = measurement_subject(spec.model, settings, str(device.get("name", "cpu")))
    measurement = context.store.measurement(subject)
    if measurement is None:
        return plan
    seconds = measurement["seconds_per_step"]
    share = settings.get("preview_share", TrainConfig.preview_share)
    return {
        **plan,
        "estimated_seconds": run_s(seconds * plan["slowdown"], seen=plan["steps"], preview_share=share),
        "seconds_per_step": seconds,
        "seconds": seconds * plan["steps"],
        "measured_at": measurement["measured_at"],
    }


async def _jobs(context: ServerContext, call: Call) -> Any:
    states = _states(call.text("states"))
    limit, offset = call.number("limit", 100, least=1, most=_MOST_LISTED), call.number("offset", 0)
    if run := call.text("about"):
        found = [job for job in context.store.about(run) if job.state in states]
        return {"jobs": tuple(job_answer(job) for job in found[offset : offset + limit]), "total": len(found)}
    active, ended = ([kind for kind in kinds if kind in states] for kinds in (ACTIVE, ENDED))
    counts = context.store.counts()
    shown = context.store.active(limit, offset, active)
    if len(shown) < limit:
        before = sum(counts[state] for state in active)
        shown += context.store.ended(limit - len(shown), max(0, offset - before), ended)
    answers = tuple(job_answer(job) for job in shown)
    return {"jobs": answers, "total": sum(counts[state] for state in states)}


async def _add(context: ServerContext, call: Call) -> Any:
    body: JobBody = call.body
    digest = hashlib.sha256(json.dumps(json_values(body), sort_keys=True).encode()).hexdigest()
    if body.key and (known := context.store.of_key(body.key, digest)) is not None:
        return json_response(job_answer(known))
    limits = _checked_terms(body)
    notify = {"notify": _checked_notify(context.config, body.notify)} if body.notify else {}
    spec = (await wanted_spec(context, body)).requested(context.config.folders())
    if body.key and (known := context.store.of_key(body.key, digest)) is not None:  # sent twice at once
        return json_response(job_answer(known))
    request = {**spec.to_request(), **({"evaluate": True} if body.evaluate else {})}
    terms = {"key": body.key or None, "priority": body.priority, "deadline": body.deadline, "limits": limits}
    return job_answer(context.dispatcher.submit("train", request, front=body.front, digest=digest, **terms, **notify))


def _checked_notify(config: ServerConfig, url: str) -> str:
    """An address for notices. Raises OptionError if the operator does not allow it."""
    if config.notify_secret is None:
        raise OptionError("notify needs a server that signs notices; have it started with --notify-host and a secret")
    from lorasmith.server.notices import checked_url

    return checked_url(url, config.all_notify_hosts())


def _checked_terms(body: JobBody) -> dict[str, Any]:
    """The limits of a job that are set. Raises OptionError."""
    if len(body.key) > _LONGEST_KEY or not body.key.isprintable():
        raise OptionError(f"key must have at most {_LONGEST_KEY} printable characters, got {len(body.key)}")
    if abs(body.priority) > _MOST_PRIORITY:
        raise OptionError(f"priority must be between -{_MOST_PRIORITY} and {_MOST_PRIORITY}, got {body.priority}")
    if body.deadline is not None and body.deadline <= time.time():
        raise OptionError(f"deadline must be in the future, in seconds since the epoch, got {body.deadline:g}")
    limits = {name: value for name, value in asdict(body.limits).items() if value is not None}
    for name, value in limits.items():
        if value <= 0:
            raise OptionError(f"limits.{name} must be above 0, got {value:g}; leave it out for no limit")
    steps = body.settings.get("steps")
    if isinstance(steps, int) and steps > limits.get("steps", steps):
        raise OptionError(f"steps must be at most limits.steps, {limits['steps']}, got {steps}; lower steps")
    return limits


async def _measure(context: ServerContext, call: Call) -> Any:
    spec = await wanted_spec(context, call.body)
    spec.requested(context.config.folders())
    return job_answer(context.dispatcher.submit("measure", {"model": spec.model, "settings": spec.settings}))


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
    return job_answer(context.store.get(job.id))


async def _continue(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.proceed(call.path("id")))


async def _retry(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.retry(call.path("id")))


async def _move(context: ServerContext, call: Call) -> Any:
    return job_answer(context.dispatcher.move(call.path("id"), call.body.front))


async def _sweeps(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("sweeps", queued=context.store.sweeps())


async def _sweep(context: ServerContext, call: Call) -> Any:
    return await _sweep_answer(context, call.path("id"))


async def _add_sweep(context: ServerContext, call: Call) -> Any:
    spec = await wanted_spec(context, call.body)
    found = await context.assistant.ask("sweep_requests", spec=spec.to_request(), grid=call.body.grid)
    for job in found["jobs"]:
        context.dispatcher.submit("train", job["request"], sweep=found["id"], varied=job["varied"])
    return await _sweep_answer(context, found["id"])


async def _sweep_answer(context: ServerContext, id: str) -> Any:
    queued = [
        {"request": job.request, "varied": job.varied, "failure": job.failure} for job in context.store.of_sweep(id)
    ]
    return await context.assistant.ask("sweep", id=id, queued=queued)


async def wanted_spec(context: ServerContext, body: MeasurementBody) -> RunSpec:
    """The run that a request describes, before its settings are checked. Raises UnknownFileError, DataError and
    ModelError.
    """
    return await asyncio.to_thread(_wanted_spec, context.config, body)


def _wanted_spec(config: ServerConfig, body: MeasurementBody) -> RunSpec:
    folders, settings = config.folders(), body.settings
    if not isinstance(body, PlanBody):
        return RunSpec(model=known_model(folders, body.model), settings=settings)
    named = body.name if isinstance(body, JobBody | SweepBody) else ""
    if is_url(body.folder or ""):
        source = ImageSource(_checked_address(config, body))
        title = source.title
    else:
        images, base = _images_folder(config, folders, body), folders.base
        source = ImageSource(images.relative_to(base).as_posix() if images.is_relative_to(base) else str(images))
        title = images.name
    return RunSpec(
        sources=(source,),
        model=known_model(folders, body.model),
        edit=body.edit,
        name=safe_name(named.strip() or title),
        preset=body.preset,
        kind=body.teaches,
        settings={**settings, **({"trigger": body.trigger} if body.trigger else {})},
    )


def _checked_address(config: ServerConfig, body: PlanBody) -> str:
    """The address of the pictures of a job. Raises OptionError if the operator does not allow it."""
    url = body.folder or ""
    if not isinstance(body, JobBody):
        raise OptionError("pictures at an address are fetched when a job trains on them; plan with a dataset")
    inner = re.split(r"[/\\]", unquote(url))
    if not url.startswith(tuple(config.pictures_from)) or ".." in inner or url.endswith("/"):
        known = ", ".join(config.pictures_from) or "no address"
        raise OptionError(
            f"pictures are fetched from below {known}, as the operator allows, got {printable(url, limit=200)}; have "
            "the server started with --pictures-from"
        )
    return url


def _images_folder(config: ServerConfig, folders: Folders, body: PlanBody) -> Path:
    """The folder of the images: a dataset, or a folder by its path, which must be in the base folder if the server
    serves others.
    """
    if (body.dataset is None) == (body.folder is None):
        raise OptionError("a run needs images, in a dataset or in a folder; name one of the two")
    if body.folder is None:
        place = dataset_folder(folders, body.dataset or "")
    elif serves_others(config):
        try:
            place = contained(config.base, body.folder)
        except OutsideError as error:
            raise OptionError(f"a folder must be named below the server's base folder, but {error}") from error
    else:
        # leaves the names of unknown users as they are
        place = folders.base / os.path.expanduser(body.folder)  # noqa: PTH111
    # Windows would connect to the server in a UNC path, with slashes or backslashes.
    is_share = PureWindowsPath(body.folder or "").drive.startswith("\\\\") and not place.is_relative_to(folders.base)
    if is_share or not is_folder(place):
        raise DataError(f"there is no folder {body.folder!r} on this computer; check its path")
    try:
        if any(place.iterdir()):
            return place
    except OSError as error:
        raise OutputError(f"a file cannot be used: {error}") from error
    raise DataError(f"{place.name} holds no pictures yet; add some first")


def _states(text: str) -> tuple[JobState, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in STATES:
            raise OptionError(f"states must be of {', '.join(STATES)}, got {name[:40]!r}{nearest(name, STATES)}")
    return cast(tuple[JobState, ...], tuple(dict.fromkeys(names)) or STATES)


JOB_ROUTES = (
    Endpoint(
        "POST",
        "/plans",
        "The plan of a run: steps, memory, and its time if a step was measured.",
        handler=_plan,
        body=PlanBody,
        answer=PlanAnswer,
        reads=True,
    ),
    Endpoint(
        "POST",
        "/measurements",
        "Queue a job that measures a step on this device; later plans have its time.",
        handler=_measure,
        body=MeasurementBody,
        answer=JobAnswer,
        status=201,
    ),
    Endpoint(
        "GET",
        "/jobs",
        "Jobs: those that run, those that wait, then those that ended, the last first.",
        handler=_jobs,
        query=(
            Query("states", "States of jobs, separated by commas; all without it."),
            Query("limit", "Number of jobs, at most 500.", "integer"),
            Query("offset", "Number of jobs to leave out.", "integer"),
            Query("about", "Those alone that draw with the LoRAs of a run or evaluate them, by its id."),
        ),
        answer=JobList,
    ),
    Endpoint("POST", "/jobs", "Queue a job that trains.", handler=_add, body=JobBody, answer=JobAnswer, status=201),
    Endpoint("GET", "/jobs/{id}", "A job.", handler=_job, answer=JobAnswer),
    Endpoint(
        "DELETE", "/jobs/{id}", "Remove a job from queue or history; its run stays.", handler=_remove, answer=RemovedJob
    ),
    Endpoint(
        "POST",
        "/jobs/{id}/cancel",
        "Stop a job, for good or to be continued; what it has trained is saved.",
        handler=_cancel,
        body=CancelBody,
        answer=JobAnswer,
    ),
    Endpoint(
        "POST",
        "/jobs/{id}/continue",
        "Continue a job that is paused, interrupted or cancelled.",
        handler=_continue,
        answer=JobAnswer,
    ),
    Endpoint(
        "POST",
        "/jobs/{id}/retry",
        "Queue a new job with the request of an ended one.",
        handler=_retry,
        answer=JobAnswer,
        status=201,
    ),
    Endpoint(
        "POST",
        "/jobs/{id}/move",
        "Move a waiting job to the front or the end.",
        handler=_move,
        body=MoveBody,
        answer=JobAnswer,
    ),
    Endpoint(
        "GET",
        "/events",
        "Every change of a job, of the queue, of datasets and of drafts, and the events of single jobs and runs.",
        handler=all_events,
        query=(Query("topic", "jobs/ID or runs/ID, whose events come too; may be given several times."),),
        content="text/event-stream",
    ),
    Endpoint(
        "GET",
        "/jobs/{id}/events",
        "A job: its changes, and what is shown of its run.",
        handler=job_events,
        content="text/event-stream",
    ),
)

SWEEP_ROUTES = (
    Endpoint("GET", "/sweeps", "All sweeps below the base folder.", handler=_sweeps, answer=SweepList),
    Endpoint(
        "POST",
        "/sweeps",
        "Queue a run for each combination of values.",
        handler=_add_sweep,
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
