"""The OpenAPI document, made from the endpoints and their request and response types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from lorasmith.core.typed_json import DIALECT, json_schema
from lorasmith.server.api.endpoint import PREFIX, Endpoint
from lorasmith.server.api_shapes import ErrorAnswer

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
