"""Helpers of the protocol's routes: reading bodies, and errors as one-sentence responses."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.request_handling import apart, read_body, status_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refused(status: int, message: str) -> web.Response:
    """An error response of the protocol."""
    return web.json_response({"error": message}, status=status)


def answering(handler: Handler) -> Handler:
    """Wraps a handler so that its LorasmithErrors become responses."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except LorasmithError as error:
            return refused(status_of(error), str(error))

    return answer


def table(routes: list[tuple[str, str, Handler]]) -> list[web.RouteDef]:
    """Routes from (method, path, handler), each handler wrapped by `answering`."""
    return [web.route(method, path, answering(handler)) for method, path, handler in routes]


async def read_json(request: web.Request, *, kind: type | None = None, empty: Any = ...) -> Any:
    """The JSON of a request, whatever its Content-Type; `empty` for an empty body, if allowed. Raises OptionError."""
    body = await read_body(request)
    if not body.strip() and empty is not ...:
        return empty
    try:
        value = await apart(len(body), parse_foreign_json, body)
    except ValueError as error:
        raise OptionError(f"the body must be JSON, but it {error}") from error
    if kind is not None and not isinstance(value, kind):
        raise OptionError(f"the body must be {_NAMES[kind]}, got {type(value).__name__}")
    return value


_NAMES: dict[type, str] = {dict: "an object", list: "a list"}
