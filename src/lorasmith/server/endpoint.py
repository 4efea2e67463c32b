"""One declaration per route of the API (method, path, body, answer, query), from which routes and document are made.

A route is answered by a question to the assistant, or by a handler: an async function of the server's context and a
`Call`, which returns a declared type, a JSON value, or a response. `request_handling` turns exceptions into responses.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.registry import nearest
from lorasmith.core.typed_json import DIALECT, json_schemas, json_values, typed
from lorasmith.runs.queue import JobKind
from lorasmith.server.hub import Notice
from lorasmith.server.jobs.job_rows import job_answer
from lorasmith.server.jobs.job_shapes import JobAnswer
from lorasmith.server.request_handling import ServerContext, number_in, parsed_in_thread, read_body, while_connected

PREFIX = "/lorasmith/v1"


@dataclass(frozen=True, kw_only=True)
class ErrorFacts:
    """What went wrong."""

    kind: Annotated[str, "name of the kind of error, such as OptionError"]
    message: Annotated[str, "a sentence with rule, value and remedy"]
    details: Annotated[Any, "more about it, such as a list of findings; null if there is no more"] = None


@dataclass(frozen=True, kw_only=True)
class ErrorAnswer:
    """The answer to a request that was not carried out."""

    error: ErrorFacts


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

    @property
    def arguments(self) -> dict[str, Any]:
        """The parts of the path and the fields of the body by name."""
        fields_given = {} if self.body is None else vars(self.body)  # without what has its default
        return {**self.request.match_info, **{name: json_values(value) for name, value in fields_given.items()}}

    def path(self, name: str) -> str:
        return self.request.match_info[name]

    def text(self, name: str) -> str:
        return self.request.query.get(name, "")

    def number(self, name: str, default: int, *, least: int = 0, most: int = 2**31) -> int:
        """An integer of the query. Raises OptionError."""
        found = number_in(self.request, name, at_least=least, at_most=most)
        return default if found is None else found


Handler = Callable[[ServerContext, Call], Awaitable[Any]]


@dataclass(frozen=True)
class Endpoint:
    """A route of the API."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str  # below `PREFIX`; `{name}` matches one segment, `{name:.+}` also slashes
    summary: str
    _: KW_ONLY
    question: str = ""  # name of the `question` that answers, given `Call.arguments`
    queues: JobKind | None = None  # kind of a job of which the answer to the question is the request
    handler: Handler | None = None  # in place of a question
    body: Any = None  # type of the JSON body
    answer: Any = None  # type of the JSON response; None: another media type, `content`
    status: int = 200
    query: Sequence[Query] = ()
    content: str = ""  # media type of a body or response that is not JSON
    reads: bool = False  # changes nothing, as every GET: given up when the client disconnects
    upload: bool = False  # the body is multipart/form-data
    changes_dataset: bool = False  # that of the path's `name`, or of the body's; pages that show it load it again

    @property
    def plain_path(self) -> str:
        """The path without patterns."""
        return re.sub(r"\{(\w+)[^}]*\}", r"{\1}", self.path)


def queueing(path: str, summary: str, kind: JobKind, question: str, body: Any) -> Endpoint:
    """A request that queues a job, whose own request is the answer to a question."""
    return Endpoint("POST", path, summary, question=question, queues=kind, body=body, answer=JobAnswer, status=201)


def route_of(endpoint: Endpoint, context: ServerContext) -> web.RouteDef:
    """The route that serves an endpoint."""

    async def handle(request: web.Request) -> web.StreamResponse:
        call = Call(request, None if endpoint.body is None else await _body(request, endpoint.body))
        is_read = endpoint.method == "GET" or endpoint.reads
        return await (while_connected(request, answered(call)) if is_read else answered(call))

    async def answered(call: Call) -> web.StreamResponse:
        if endpoint.handler is None:
            answer = await context.assistant.ask(endpoint.question, **call.arguments)
            if endpoint.queues is not None:
                answer = job_answer(context.dispatcher.submit(endpoint.queues, answer))
        else:
            answer = await endpoint.handler(context, call)
        if endpoint.changes_dataset:
            name = call.request.match_info.get("name") or call.body.name
            context.hub.publish(Notice(kind="dataset", data={"name": name}))
        return answer if isinstance(answer, web.StreamResponse) else json_response(answer, endpoint.status)

    # A HEAD request would leave a stream open that nobody reads.
    more = {"allow_head": False} if endpoint.content == "text/event-stream" else {}
    return web.route(endpoint.method, PREFIX + endpoint.path, handle, **more)


def json_response(value: Any, status: int = 200) -> web.Response:
    """A JSON response that is never cached. `value` is a declared type, or JSON values."""
    # Not msgspec.json.encode, which refuses the lone surrogates in undecodable file names.
    text = json.dumps(json_values(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
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
        return await parsed_in_thread(len(content), _typed_body, content, kind)
    except ValueError as error:
        text = str(error)
        clause = text if text.startswith(("is ", "has ", "holds ")) else f"is wrong: {text}"
        raise OptionError(f"the body of the request {clause}; correct it") from error


def _typed_body(content: bytes, kind: Any) -> Any:
    found = parse_foreign_json(content) if content else {}
    if isinstance(found, dict) and dataclasses.is_dataclass(kind):
        known = [field.name for field in dataclasses.fields(kind)]
        if (unknown := next((name for name in found if name not in known), None)) is not None:
            raise OptionError(
                f"unknown name {unknown!r} in the request{nearest(unknown, known)}; known are {', '.join(known)}"
            )
    return typed(found, kind)


API_VERSION = "1"  # additions keep it; incompatible changes increase it


def api_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of some endpoints."""
    kinds = [
        ErrorAnswer,
        *(kind for endpoint in endpoints for kind in (endpoint.body, endpoint.answer) if kind is not None),
    ]
    schemas, components = json_schemas(kinds, "#/components/schemas/")
    remaining = iter(schemas)
    error = {"description": "It was not done; the message says why.", "content": _content(next(remaining))}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        body = None if endpoint.body is None else next(remaining)
        answer = {"type": "string"} if endpoint.answer is None else next(remaining)
        responses = {
            str(endpoint.status): {"description": "The answer.", "content": _content(answer, endpoint.content)},
            "default": error,
        }
        operation = {"summary": endpoint.summary, **_request(endpoint, body), "responses": responses}
        paths.setdefault(endpoint.plain_path, {})[endpoint.method.lower()] = operation
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
        "components": {"schemas": components},
    }


def _request(endpoint: Endpoint, body: dict[str, Any] | None) -> dict[str, Any]:
    """Parameters and body of an operation."""
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", endpoint.plain_path)
    ]
    for each in endpoint.query:
        parameters.append({"name": each.name, "in": "query", "description": each.help, "schema": {"type": each.type}})
    found: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if endpoint.upload:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        form = {"type": "object", "additionalProperties": file}
        found["requestBody"] = {"required": True, "content": _content(form, "multipart/form-data")}
    elif body is not None:
        found["requestBody"] = {"content": _content(body)}
    return found


def _content(schema: dict[str, Any], media_type: str = "") -> dict[str, Any]:
    return {media_type or "application/json": {"schema": schema}}
