"""Errors as responses: a status, and `{"error": {"kind", "message", "details"}}`."""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Awaitable, Callable

from aiohttp import web

from lorasmith.core.errors import LorasmithError
from lorasmith.server.assistant import RefusedError
from lorasmith.server.jobs import StoreError
from lorasmith.server.server_context import CONTEXT

_STATUS = {
    "DiskFullError": 507,
    "DuplicateJobError": 409,
    "InternalError": 500,
    "JobStateError": 409,
    "OutsideError": 403,
    "QueueFullError": 429,
    "StaleCaptionError": 409,
    "TakenNameError": 409,
    "SlowClientError": 408,
    "TooLargeError": 413,
    "TooManyError": 429,
    "UnavailableError": 503,
    "UnknownFileError": 404,
    "UnknownJobError": 404,
}
"""By kind, raised here or by the assistant; all others are 400."""


class TooManyError(LorasmithError):
    """Too many streams or uploads at once."""


class TooLargeError(LorasmithError):
    """A request body is too large."""


class SlowClientError(LorasmithError):
    """A client has stopped sending its body."""


def status_of(error: LorasmithError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, StoreError):
        return 507 if error.is_full else 503
    if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOSPC:
        return 507
    return _STATUS.get(_kind(error), 400)


def error_answer(error: LorasmithError) -> web.Response:
    """The response for an error."""
    details = error.details if isinstance(error, RefusedError) else None
    return error_response(status_of(error), _kind(error), str(error), details)


def error_response(status: int, kind: str, message: str, details: object = None) -> web.Response:
    """An error response, in the form of all routes except ComfyUI's; `details` are JSON values."""
    text = json.dumps({"error": {"kind": kind, "message": message, "details": details}})
    return web.json_response(text=text, status=status, headers={"Cache-Control": "no-store"})


@web.middleware
async def errors_answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Middleware: exceptions become responses; a bug is logged, and its response names the log."""
    try:
        return await handler(request)
    except LorasmithError as error:
        return error_answer(error)
    except (web.HTTPException, ConnectionError):  # responses of aiohttp; client disconnected
        raise
    except Exception as error:
        if request.writer.output_size:  # headers are sent: closing the connection marks the response as incomplete
            raise
        context = request.app[CONTEXT]
        context.log.add("server", f"{request.method} {request.path} failed\n{traceback.format_exc()}")
        log = context.config.log.relative_to(context.config.base).as_posix()  # the client may be unauthenticated
        message = f"the server failed ({type(error).__name__}); the reason is in {log} of its base folder"
        return error_response(500, "InternalError", message)


def _kind(error: LorasmithError) -> str:
    return error.kind if isinstance(error, RefusedError) else type(error).__name__
