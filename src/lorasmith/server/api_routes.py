"""All endpoints of the API as routes; those about the server: its state, settings, models, and the OpenAPI document."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import metadata, version
from typing import Annotated, Any, Literal

from aiohttp import web

from lorasmith.core.options import Option
from lorasmith.core.printable import sentence
from lorasmith.core.typed_json import typed
from lorasmith.runs.presets import PRESETS, Preset, recipe_settings, setting_groups
from lorasmith.server.datasets.dataset_routes import DATASET_ROUTES
from lorasmith.server.endpoint import PREFIX, Call, Endpoint, Query, api_document, route_of
from lorasmith.server.jobs.draft_routes import DRAFT_ROUTES
from lorasmith.server.jobs.job_routes import JOB_ROUTES, SWEEP_ROUTES
from lorasmith.server.models.model_routes import MODEL_ROUTES
from lorasmith.server.questions import shaped
from lorasmith.server.request_handling import ServerContext, error_response
from lorasmith.server.runs.run_routes import RUN_ROUTES

SettingType = Literal["integer", "number", "text", "boolean"]


@dataclass(frozen=True, kw_only=True)
class QueueCounts:
    """Jobs that wait and that run."""

    pending: int
    running: int


@dataclass(frozen=True, kw_only=True)
class TrainingDevice:
    """A device that trains."""

    name: Annotated[str, "such as cuda:0 or cpu"]
    title: Annotated[str, "name by its maker"] = ""
    memory_bytes: Annotated[int | None, "size of its memory; null if unknown"] = None
    free_bytes: Annotated[int | None, "free memory; null if unknown"] = None


@dataclass(frozen=True, kw_only=True)
class StatusAnswer:
    """The state of the server."""

    version: Annotated[str, "of Lorasmith"]
    docs: Annotated[str, "address of this version's documentation, with a slash at its end; empty if it has none"]
    ready: Annotated[bool, "whether the assistant answers; until then, what needs it is answered with 503"]
    base_dir: Annotated[str, "the base folder"]
    devices: Annotated[tuple[TrainingDevice, ...], "that train"]
    queue: Annotated[QueueCounts, "number of jobs"]
    disk_free_bytes: Annotated[int, "of the base folder's disk"]
    draining: Annotated[bool, "whether no further jobs are started"] = False


@dataclass(frozen=True, kw_only=True)
class DrainBody:
    """Whether the server starts no further jobs, and ends when those that run have ended."""

    drain: bool = True


@dataclass(frozen=True, kw_only=True)
class SettingAnswer:
    """A setting of data or training."""

    name: Annotated[str, "as on the command line, with underscores"]
    label: Annotated[str, "in words"]
    type: Annotated[SettingType, "of the value"]
    default: Annotated[bool | int | float | str | None, "null if the run decides it"]
    help: Annotated[str, "its meaning"]
    min: Annotated[float | None, "smallest number; null for no limit"] = None
    max: Annotated[float | None, "largest number; null for no limit"] = None
    step: Annotated[float | None, "granularity of a number; null for none"] = None
    choices: Annotated[tuple[str, ...], "allowed values of a text; empty if any text is allowed"] = ()
    main: Annotated[bool, "whether it is shown before the others"] = False


@dataclass(frozen=True, kw_only=True)
class SettingGroup:
    """Settings under one heading."""

    title: str
    settings: tuple[SettingAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class SettingsAnswer:
    """Every setting that a page offers, and the choices for who asks for none."""

    groups: tuple[SettingGroup, ...]
    presets: tuple[Preset, ...]


_TYPES: dict[type, SettingType] = {int: "integer", float: "number", str: "text", bool: "boolean"}


async def _settings(context: ServerContext, call: Call) -> SettingsAnswer:
    images = call.number("images", 0) or None
    return SettingsAnswer(
        groups=tuple(
            SettingGroup(title=title, settings=tuple(map(setting_answer, options)))
            for title, options in setting_groups().items()
        ),
        presets=tuple(replace(preset, settings=recipe_settings(preset, images=images)) for preset in PRESETS.values()),
    )


def _docs() -> str:
    urls = [entry.partition(", ") for entry in metadata("lorasmith").get_all("Project-URL") or ()]
    published = next((address for label, _, address in urls if label == "Documentation"), "")
    address = os.environ.get("LORASMITH_DOCS", published)
    return f"{address.rstrip('/')}/" if address else ""


async def _status(context: ServerContext, call: Call) -> StatusAnswer:
    return StatusAnswer(
        version=version("lorasmith"),
        docs=_docs(),
        ready=context.assistant.is_ready,
        base_dir=str(context.config.base),
        devices=typed(context.dispatcher.devices(), tuple[TrainingDevice, ...]),
        queue=QueueCounts(**context.store.queue_counts()),
        disk_free_bytes=shutil.disk_usage(context.config.base).free,
        draining=context.dispatcher.is_draining,
    )


async def _drain(context: ServerContext, call: Call) -> StatusAnswer:
    context.dispatcher.drain(drains=call.body.drain)
    return await _status(context, call)


def setting_answer(setting: Option) -> SettingAnswer:
    """A setting as pages get it."""
    label, kind = setting.name.replace("_", " ").capitalize(), _TYPES[setting.type]
    return shaped(SettingAnswer, setting, label=label, type=kind, choices=tuple(setting.choices), main=setting.is_main)


SERVER_ROUTES = (
    Endpoint("GET", "/status", "The state of the server.", handler=_status, answer=StatusAnswer),
    Endpoint(
        "POST",
        "/drain",
        "Start no further jobs, and end the server when those that run have ended; or start jobs again.",
        handler=_drain,
        body=DrainBody,
        answer=StatusAnswer,
    ),
    Endpoint(
        "GET",
        "/settings",
        "Every setting that a page offers, and the three choices for who asks for none.",
        handler=_settings,
        query=(Query("images", "Number of images, which the steps of the choices follow.", "integer"),),
        answer=SettingsAnswer,
    ),
)


async def _document(context: ServerContext, call: Call) -> dict[str, Any]:
    return api_document(ENDPOINTS)


ENDPOINTS: tuple[Endpoint, ...] = (
    *SERVER_ROUTES,
    *MODEL_ROUTES,
    *DATASET_ROUTES,
    *DRAFT_ROUTES,
    *JOB_ROUTES,
    *RUN_ROUTES,
    *SWEEP_ROUTES,
    Endpoint("GET", "/openapi.json", "This document.", handler=_document, answer=dict[str, Any]),
)


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes of the API; any other path below its prefix is a 404."""
    return [*(route_of(endpoint, context) for endpoint in ENDPOINTS), web.route("*", f"{PREFIX}/{{rest:.*}}", _unknown)]


async def _unknown(request: web.Request) -> web.Response:
    path = request.path.removeprefix(PREFIX)
    message = sentence(f"there is no {request.method} {path}; see {PREFIX}/openapi.json")
    return error_response(404, "UnknownPathError", message)
