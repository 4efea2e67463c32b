"""All endpoints of the API as routes; those about the server: its state, settings, models, and the OpenAPI document."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from aiohttp import web

from lorasmith.core.options import Option
from lorasmith.core.printable import sentence
from lorasmith.core.typed_json import typed
from lorasmith.runs.presets import PRESETS, setting_groups
from lorasmith.server.api.dataset_endpoints import DATASET_ENDPOINTS
from lorasmith.server.api.draft_endpoints import DRAFT_ENDPOINTS
from lorasmith.server.api.endpoint import PREFIX, Call, Endpoint, Query, api_document, route_of
from lorasmith.server.api.job_endpoints import JOB_ENDPOINTS
from lorasmith.server.api.run_endpoints import RUN_ENDPOINTS
from lorasmith.server.api.shelf_endpoints import SHELF_ENDPOINTS
from lorasmith.server.api.sweep_endpoints import SWEEP_ENDPOINTS
from lorasmith.server.api_shapes import (
    ModelListAnswer,
    QueueCounts,
    SettingAnswer,
    SettingGroup,
    SettingsAnswer,
    SettingType,
    StatusAnswer,
    TrainingDevice,
)
from lorasmith.server.request_handling import ServerContext, error_response

_TYPES: dict[type, SettingType] = {int: "integer", float: "number", str: "text", bool: "boolean"}


async def _settings(context: ServerContext, call: Call) -> SettingsAnswer:
    images = call.number("images", 0) or None
    return SettingsAnswer(
        groups=tuple(
            SettingGroup(title=title, settings=tuple(map(_setting, options)))
            for title, options in setting_groups().items()
        ),
        presets=tuple(replace(one, settings=one.settings_for(images)) for one in PRESETS.values()),
    )


async def _status(context: ServerContext, call: Call) -> StatusAnswer:
    return StatusAnswer(
        version=version("lorasmith"),
        ready=context.assistant.is_ready,
        base_dir=str(context.config.base),
        devices=typed(context.dispatcher.devices(), tuple[TrainingDevice, ...]),
        queue=QueueCounts(**context.store.queue_counts()),
        disk_free_bytes=shutil.disk_usage(context.config.base).free,
    )


def _setting(one: Option) -> SettingAnswer:
    return SettingAnswer(
        name=one.name,
        label=one.name.replace("_", " ").capitalize(),
        type=_TYPES[one.type],
        default=one.default,
        help=one.help,
        min=one.min,
        max=one.max,
        step=one.step,
        choices=tuple(one.choices),
        main=one.is_main,
    )


SERVER_ENDPOINTS = (
    Endpoint("GET", "/status", "The state of the server.", handler=_status, answer=StatusAnswer),
    Endpoint(
        "GET",
        "/settings",
        "Every setting that a page offers, and the three choices for who asks for none.",
        handler=_settings,
        query=(Query("images", "Number of images, which the steps of the choices follow.", "integer"),),
        answer=SettingsAnswer,
    ),
    Endpoint("GET", "/models", "The models in the model folders.", question="models", answer=ModelListAnswer),
)


async def _document(context: ServerContext, call: Call) -> dict[str, Any]:
    return api_document(ENDPOINTS)


ENDPOINTS: tuple[Endpoint, ...] = (
    *SERVER_ENDPOINTS,
    *SHELF_ENDPOINTS,
    *DATASET_ENDPOINTS,
    *DRAFT_ENDPOINTS,
    *JOB_ENDPOINTS,
    *RUN_ENDPOINTS,
    *SWEEP_ENDPOINTS,
    Endpoint("GET", "/openapi.json", "This document.", handler=_document, answer=dict[str, Any]),
)


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes of the API; any other path below its prefix is a 404."""
    return [*(route_of(one, context) for one in ENDPOINTS), web.route("*", f"{PREFIX}/{{rest:.*}}", _unknown)]


async def _unknown(request: web.Request) -> web.Response:
    path = request.path.removeprefix(PREFIX)
    said = sentence(f"there is no {request.method} {path}; see {PREFIX}/openapi.json")
    return error_response(404, "UnknownPathError", said)
