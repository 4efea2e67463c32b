"""Write docs/schemas: the JSON schemas of the files in the folders of runs and sweeps, from the types that read them,
and the OpenAPI document of the server's API, from its endpoints; and of that the types of the page's modules.

python -m tools.schemas
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lorasmith.core.typed_json import DIALECT, json_schemas
from lorasmith.runs.sweep_results import SweepRecord
from lorasmith.server.api_routes import ENDPOINTS
from lorasmith.server.endpoint import api_document
from lorasmith.training.events import EVENTS_VERSION, KINDS
from lorasmith.training.storage.records import RunRecord

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
TYPES = Path(__file__).parent / "pages" / "types" / "api.d.ts"


def schemas() -> dict[str, dict[str, Any]]:
    """Each schema by the name of its file."""
    return {
        "run.schema.json": _of_file("run.json of a run's folder", RunRecord),
        "events.schema.json": _of_events(),
        "sweep.schema.json": _of_file("sweep.json of a sweep's folder", SweepRecord),
        "openapi.json": api_document(ENDPOINTS),
    }


def _of_file(title: str, kind: type) -> dict[str, Any]:
    (schema,), named = json_schemas([kind])
    return {"$schema": DIALECT, "title": title, **schema, "$defs": named}


def _of_events() -> dict[str, Any]:
    schemas, named = json_schemas(list(KINDS.values()))
    for name in KINDS:
        schema = named[name]
        schema["properties"] = {
            "event": {"const": name},
            "version": {"type": "integer", "description": f"of the format, {EVENTS_VERSION}; 1 if missing"},
            **schema["properties"],
        }
        schema["required"] = ["event", *schema["required"]]
    return {
        "$schema": DIALECT,
        "title": "a line of events.jsonl in a run's folder",
        "oneOf": schemas,
        "$defs": named,
    }


def page_types(document: dict[str, Any]) -> str:
    """TypeScript's declarations of an OpenAPI document: its schemas, and its endpoints by method.

    What the server writes has all properties; what only requests have may leave those with a default out.
    """
    named: dict[str, Any] = document["components"]["schemas"]
    endpoints: dict[str, list[str]] = {}
    answered: set[str] = set()
    for path, methods in document["paths"].items():
        typed = ["string" if part[0] == "{" else f'"{part}"' for part in path.split("/")[1:]]
        for method, endpoint in methods.items():
            query = [one for one in endpoint.get("parameters", []) if one["in"] == "query"]
            asked = "".join(f"{one['name']}?: {_typescript(one['schema'])} | null; " for one in query)
            body = endpoint.get("requestBody", {}).get("content", {})
            sent = "FormData" if "multipart/form-data" in body else "{}"
            if "application/json" in body:
                sent = _typescript(body["application/json"]["schema"])
            (content,) = [one["content"] for status, one in endpoint["responses"].items() if status < "300"]
            answer = content["application/json"]["schema"] if "application/json" in content else {}
            answered |= _named_in(answer, named)
            row = f"path: [{', '.join(typed)}]; query: {{ {asked}}}; body: {sent}; answer: {_typescript(answer)}"
            endpoints.setdefault(method.capitalize(), []).append(f"    | {{ {row} }}")
    lines = ["// Written by python -m tools.schemas of docs/schemas/openapi.json.", "declare namespace Api {"]
    for name, schema in named.items():
        lines.append(f"  interface {name} {{")
        for key, value in schema["properties"].items():
            there = key in schema["required"] or name in answered
            lines.append(f"    {key}{'' if there else '?'}: {_typescript(value)};")
        lines.append("  }")
    for method, rows in endpoints.items():
        lines += [f"  type {method} =", *rows[:-1], f"{rows[-1]};"]
    return "\n".join([*lines, "}", ""])


def _typescript(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " | ".join(map(_typescript, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(map(_typescript, schema['prefixItems']))}]"
        case "array":
            return f"({_typescript(schema.get('items', {}))})[]"
        case "object":
            return f"Record<string, {_typescript(schema.get('additionalProperties', {}))}>"
        case "integer" | "number":
            return "number"
        case None:
            return "any"
        case kind:
            return str(kind)


def _named_in(schema: Any, named: dict[str, Any], found: frozenset[str] = frozenset()) -> set[str]:
    """Names of the schemas that one refers to, also through others."""
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema))) - found
    return names.union(*(_named_in(named[name], named, found | names) for name in names))


def main() -> None:
    """Write all of them."""
    TYPES.parent.mkdir(exist_ok=True)
    TYPES.write_text(page_types(api_document(ENDPOINTS)), encoding="utf-8")
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (FOLDER / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
