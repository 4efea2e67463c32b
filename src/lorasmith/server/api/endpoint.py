"""One declaration per route of the API (method, path, body, answer, query), from which routes and document are made.

A handler is an async function of the server's context and a `Call`; it returns a type of `api_shapes`, a JSON value, or
a response. `request_handling` turns its exceptions into responses.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, TypeVar

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.registry import nearest
from lorasmith.core.typed_json import DIALECT, json_schema, typed
from lorasmith.server.api_shapes import ErrorAnswer
from lorasmith.server.request_handling import ServerContext, apart, number_in, read_body

PREFIX = "/lorasmith/v1"

T = TypeVar("T")


@dataclass(frozen=True)
class Query:
    """A query parameter."""

    name: str
    help: str
    type: Literal["string", "integer", "boolean"] = "string"


@dataclass(frozen=True)
class Call:
    """A request to an endpoint; `body` has the type that the endpoint declares."""

    request: web.Request
    body: Any = None

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def text(self, name: str, default: str = "") -> str:
        return self.request.query.get(name, default)

    def number(self, name: str, default: int, *, least: int = 0, most: int = 2**31) -> int:
        """An integer of the query. Raises OptionError."""
        found = number_in(self.request, name, at_least=least, at_most=most)
        return default if found is None else found


Handler = Callable[[ServerContext, Call], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A route of the API."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str  # below `PREFIX`; `{name}` matches one segment, `{name:.+}` also slashes
    summary: str
    handler: Handler
    body: Any = None  # type of the JSON body
    answer: Any = None  # type of the JSON response; None: another media type, `content`
    status: int = 200
    query: Sequence[Query] = ()
    content: str = ""  # media type of a body or response that is not JSON
    upload: bool = False  # the body is multipart/form-data


def route_of(endpoint: Endpoint, context: ServerContext) -> web.RouteDef:
    """The route that serves an endpoint."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = None if endpoint.body is None else await _body(request, endpoint.body)
        answer = await endpoint.handler(context, Call(request, body))
        return answer if isinstance(answer, web.StreamResponse) else json_response(answer, endpoint.status)

    # A HEAD request would leave a stream open that nobody reads.
    more = {"allow_head": False} if endpoint.content == "text/event-stream" else {}
    return web.route(endpoint.method, PREFIX + endpoint.path, handle, **more)


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON response that is never cached. `value` is a type of `api_shapes`, or JSON values."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return web.Response(
        body=text.encode("utf-8", "replace"),
        status=status,
        content_type="application/json",
        charset="utf-8",
        headers={"Cache-Control": "no-store"},
    )


async def _body(request: web.Request, kind: Any) -> Any:
    """The JSON body as a `kind`; unknown names raise OptionError."""
    content = await read_body(request)
    try:
        return await apart(len(content), _typed_body, content, kind)
    except ValueError as error:
        raise OptionError(f"the body of the request {_clause(error)}; correct it") from error


def _typed_body(content: bytes, kind: Any) -> Any:
    found = parse_foreign_json(content) if content else {}
    if isinstance(found, dict) and dataclasses.is_dataclass(kind):
        _check_names(found, [one.name for one in dataclasses.fields(kind)])
    return typed(found, kind)


def _check_names(found: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in found:
        if name not in known:
            raise OptionError(
                f"unknown name {name!r} in the request{nearest(name, known)}; known are {', '.join(known)}"
            )


def _clause(error: ValueError) -> str:
    text = str(error)
    return text if text.startswith(("is ", "has ", "holds ")) else f"is wrong: {text}"


API_VERSION = "1"  # additions keep it; incompatible changes increase it

_KINDS = {"string": {"type": "string"}, "integer": {"type": "integer"}, "boolean": {"type": "boolean"}}


def api_document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of some endpoints."""
    named: dict[str, Any] = {ErrorAnswer.__name__: json_schema(ErrorAnswer)}
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        paths.setdefault(plain_path(one), {})[one.method.lower()] = _operation(one, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lorasmith",
            "version": API_VERSION,
            "description": "Datasets, plans, jobs and runs of a server that lorasmith serve has started.",
        },
        "jsonSchemaDialect": DIALECT,
        "servers": [{"url": PREFIX}],
        "paths": paths,
        "components": {"schemas": dict(sorted(named.items()))},
    }


def plain_path(endpoint: Endpoint) -> str:
    """The path of an endpoint without patterns."""
    return re.sub(r"\{(\w+)[^}]*\}", r"{\1}", endpoint.path)


def _operation(one: Endpoint, named: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", plain_path(one))
    ]
    query = [
        {"name": each.name, "in": "query", "description": each.help, "schema": _KINDS[each.type]} for each in one.query
    ]
    found: dict[str, Any] = {"summary": one.summary}
    if parts or query:
        found["parameters"] = [*parts, *query]
    if one.upload:
        form = {
            "type": "object",
            "additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"},
        }
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    elif one.body is not None:
        found["requestBody"] = {"content": {"application/json": {"schema": _named(one.body, named)}}}
    kind = one.content or "application/json"
    schema = {"type": "string"} if one.content else _named(one.answer, named)
    found["responses"] = {
        str(one.status): {"description": "The answer.", "content": {kind: {"schema": schema}}},
        "default": {
            "description": "It was not done; the message says why.",
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}},
        },
    }
    return found


def _named(kind: Any, named: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a type, which is added to `named`; the schema itself if the type has no name."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return json_schema(kind)
    named[kind.__name__] = json_schema(kind)
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
