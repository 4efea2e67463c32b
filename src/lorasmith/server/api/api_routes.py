"""All endpoints of the API, as routes."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from lorasmith.core.printable import sentence
from lorasmith.server.api.api_document import api_document
from lorasmith.server.api.dataset_endpoints import DATASET_ENDPOINTS
from lorasmith.server.api.endpoint import PREFIX, Call, Endpoint, route_of
from lorasmith.server.api.job_endpoints import JOB_ENDPOINTS
from lorasmith.server.api.run_endpoints import RUN_ENDPOINTS
from lorasmith.server.api.server_endpoints import SERVER_ENDPOINTS
from lorasmith.server.request_handling import ServerContext, error_response


async def _document(context: ServerContext, call: Call) -> dict[str, Any]:
    return api_document(ENDPOINTS)


ENDPOINTS: tuple[Endpoint, ...] = (
    *SERVER_ENDPOINTS,
    *DATASET_ENDPOINTS,
    *JOB_ENDPOINTS,
    *RUN_ENDPOINTS,
    Endpoint(method="GET", path="/openapi.json", summary="This document.", handler=_document, answer=dict[str, Any]),
)


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes of the API; any other path below its prefix is a 404."""
    return [*(route_of(one, context) for one in ENDPOINTS), web.route("*", f"{PREFIX}/{{rest:.*}}", _unknown)]


async def _unknown(request: web.Request) -> web.Response:
    path = request.path.removeprefix(PREFIX)
    said = sentence(f"there is no {request.method} {path}; see {PREFIX}/openapi.json")
    return error_response(404, "UnknownPathError", said)
