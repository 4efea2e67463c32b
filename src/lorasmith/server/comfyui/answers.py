"""What the protocol's routes share: reading of bodies, and errors as answers of one sentence."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.error_answers import status_of
from lorasmith.server.request_parts import apart, read_body

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refused(status: int, message: str) -> web.Response:
    """An error as the protocol's routes give it."""
    return web.json_response({"error": message}, status=status)


def answering(handler: Handler) -> Handler:
    """`handler` with the errors of users as answers."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except LorasmithError as error:
            return refused(status_of(error), str(error))

    return answer


def table(routes: list[tuple[str, str, Handler]]) -> list[web.RouteDef]:
    """Routes as (method, path, handler), each with `answering`."""
    return [web.route(method, path, answering(handler)) for method, path, handler in routes]


async def read_json(request: web.Request, *, kind: type | None = None, empty: Any = ...) -> Any:
    """The JSON value of a request, whatever its Content-Type says.

    Args:
        request: the request.
        kind: type that the value must have.
        empty: value of an empty body, which is refused by default.

    Raises:
        OptionError: it is not JSON, or not of that kind.
    """
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
