"""Write docs/schemas: the JSON schemas of the files in the folders of runs and sweeps, from the types that read them,
and the OpenAPI document of the server's API, from its endpoints.

python -m tools.schemas
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.core.typed_json import DIALECT, json_schemas
from lorasmith.runs.sweep_results import SweepRecord
from lorasmith.server.api_routes import ENDPOINTS
from lorasmith.server.endpoint import api_document
from lorasmith.training.events import EVENTS_VERSION, KINDS
from lorasmith.training.storage.records import RunRecord

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


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


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (FOLDER / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
