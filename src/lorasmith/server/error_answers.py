"""Errors as answers to requests: a status, and `{"error": {"kind", "message"}}`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError
from lorasmith.server.assistant import RefusedError, UnavailableError
from lorasmith.server.jobs import DuplicateJobError, JobStateError, QueueFullError, StoreError, UnknownJobError

__all__ = ["error_answer", "errors_answered", "status_of"]

_STATUS: dict[type[LorasmithError], int] = {
    UnknownJobError: 404,
    DuplicateJobError: 409,
    JobStateError: 409,
    QueueFullError: 429,
    UnavailableError: 503,
}


def status_of(error: LorasmithError) -> int:
    """The HTTP status of an error; 400 if it is about the request."""
    if isinstance(error, StoreError):
        return 507 if error.is_full else 503
    if isinstance(error, RefusedError) and error.kind == "InternalError":
        return 500
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)


def error_answer(error: LorasmithError) -> web.Response:
    """The answer to a request that failed."""
    kind = error.kind if isinstance(error, RefusedError) else type(error).__name__
    body: dict[str, Any] = {"kind": kind, "message": str(error)}
    if isinstance(error, RefusedError) and error.details is not None:
        body["details"] = error.details
    return web.json_response({"error": body}, status=status_of(error))


@web.middleware
async def errors_answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Middleware: a LorasmithError that a handler raises becomes an answer."""
    try:
        return await handler(request)
    except LorasmithError as error:
        return error_answer(error)
