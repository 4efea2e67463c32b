"""docs/schemas are those of the types, and hold for the files of a real run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from tools import schemas as tool
from tools.schemas import FOLDER, schemas

TYPES: dict[str, Any] = {
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "null": type(None),
    "array": list,
    "object": dict,
}


def faults(value: Any, schema: dict[str, Any], place: str = "it", known: dict[str, Any] | None = None) -> Iterator[str]:
    """What of a value a schema forbids, as far as ours say anything; `known` are the schemas that it refers to."""
    known = schema.get("$defs", {}) if known is None else known
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    if "const" in schema and value != schema["const"]:
        yield f"{place} is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} is none of {schema['enum']}"
    if "anyOf" in schema and all(list(faults(value, one, place, known)) for one in schema["anyOf"]):
        yield f"{place} fits nothing"
    if "oneOf" in schema and sum(not list(faults(value, one, place, known)) for one in schema["oneOf"]) != 1:
        yield f"{place} fits not one thing alone"
    kind = TYPES.get(schema.get("type", ""), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        yield f"{place} is no {schema['type']}"
        return
    if isinstance(value, dict):
        yield from (f"{place} lacks {name}" for name in schema.get("required", []) if name not in value)
        for name, one in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from faults(one, inner, f"{place}.{name}", known)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for index, one in enumerate(value):
            inner = first[index] if index < len(first) else schema.get("items") or {}
            yield from faults(one, inner, f"{place}[{index}]", known)
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place} has {len(value)} items"


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / name).read_text(encoding="utf-8")))


def test_the_files_are_those_that_the_tool_writes() -> None:
    assert {path.name for path in FOLDER.iterdir()} == schemas().keys()
    for name, schema in schemas().items():
        assert committed(name) == json.loads(json.dumps(schema)), "run python -m tools.schemas"
    assert tool.TYPES.read_text("utf-8") == tool.page_types(schemas()["openapi.json"]), "run python -m tools.schemas"


@pytest.fixture(scope="module")
def run(tiny: Model, captions: list[Conditioning], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with something of everything."""
    data = EncodedDataset(
        tuple(Sample(torch.randn(4, 8, 8), one, f"{index}.png") for index, one in enumerate(captions * 2))
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {
        "previews": "a fox",
        "preview_every": 1,
        "preview_steps": 1,
        "preview_strengths": "1",
        "save_state_every": 1,
    }
    settings |= {"validation_share": 0.3, "validate_every": 1, "rank": 2, "targets": "*.attn2.to_q"}
    train(tiny, data, output=folder, steps=2, **settings)
    return folder


def test_a_real_run_is_as_they_say(run: Path) -> None:
    """And nothing is written that they do not describe."""
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert list(faults(record, committed("run.schema.json"))) == []
    described = committed("run.schema.json")["$defs"]["RunRecord"]["properties"].keys()
    assert record.keys() == described - {"extensions"}, "which is of runs that used some"
    known = {name: one.get("properties", {}).keys() for name, one in committed("events.schema.json")["$defs"].items()}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    names = {event["event"] for event in events}
    assert names >= {"RunStarted", "StepDone", "Validated", "Previewed", "StateSaved", "RunFinished"}
    for event in events:
        assert list(faults(event, committed("events.schema.json"))) == [], event
        assert event.keys() == known[event["event"]]


@pytest.mark.parametrize(
    "change", [{"step": "1"}, {"loss": None}, {"event": "Stepped"}, {"draws": [[1, 2]]}, {"at": True}]
)
def test_what_is_no_event_is_refused(run: Path, change: dict[str, Any]) -> None:
    lines = (run / "events.jsonl").read_text("utf-8").splitlines()
    event = next(one for line in lines if (one := json.loads(line))["event"] == "StepDone")
    assert list(faults({**event, **change}, committed("events.schema.json"))) != []
