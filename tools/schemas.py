"""Write docs/schemas: the JSON schemas of the files in the folders of runs and sweeps, from the types that read them,
and the OpenAPI document of the server's API, from its endpoints.

python -m tools.schemas
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.core.typed_json import DIALECT, json_schema
from lorasmith.runs.sweep_results import SweepRecord
from lorasmith.server.api.api_routes import ENDPOINTS
from lorasmith.server.api.endpoint import api_document
from lorasmith.training.events import EVENTS_VERSION, KINDS
from lorasmith.training.storage.records import RunRecord

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


def schemas() -> dict[str, dict[str, Any]]:
    """Each schema by the name of its file."""
    record = {"$schema": DIALECT, "title": "run.json of a run's folder", **json_schema(RunRecord)}
    return {
        "run.schema.json": record,
        "events.schema.json": {
            "$schema": DIALECT,
            "title": "a line of events.jsonl in a run's folder",
            "oneOf": [_of_event(name) for name in KINDS],
        },
        "sweep.schema.json": {
            "$schema": DIALECT,
            "title": "sweep.json of a sweep's folder",
            **json_schema(SweepRecord),
        },
        "openapi.json": json.loads(json.dumps(api_document(ENDPOINTS))),
    }


def _of_event(name: str) -> dict[str, Any]:
    schema = json_schema(KINDS[name])
    own = {
        "event": {"const": name},
        "version": {"type": "integer", "description": f"of the format, {EVENTS_VERSION}; 1 if missing"},
    }
    named = {"properties": {**own, **schema["properties"]}, "required": ["event", *schema.get("required", [])]}
    return {"title": name, **schema, **named}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (FOLDER / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
