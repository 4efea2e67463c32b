"""What docs/stability.md promises of 0.9 is there, as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.nodes.workflow_run import read_workflow
from lorasmith.workflow.graph import validate
from tests.stable.record import RECORDED
from tests.stable.surface import broken, surface

BEFORE: dict[str, Any] = json.loads((RECORDED / "surface.json").read_text("utf-8"))
ENDED: dict[str, str] = json.loads((RECORDED / "ended.json").read_text("utf-8"))
"""What was taken back, and the version that had deprecated it."""


def refused(found: list[str]) -> list[str]:
    """Sentences on what is not as it was."""
    places = {one.partition(":")[0] for one in found}
    told = [f"{one}, of which 0.9 was otherwise" for one in found if one.partition(":")[0] not in ENDED]
    told += [f"{place}: is named in ended.json, but is as it was" for place in ENDED if place not in places]
    rule = "docs/stability.md promises it: keep it, or deprecate it first and then name its place in v0.9/ended.json"
    return [f"{one} ({rule})" for one in told]


def test_all_that_0_9_had_is_as_it_was() -> None:
    now = surface()
    before = {name: one for name, one in BEFORE["entries"].items() if not name.startswith("pack ")}
    assert refused(broken({**BEFORE, "entries": before}, now)) == []


def changed(change: Callable[[dict[str, Any]], object]) -> list[str]:
    now = copy.deepcopy(BEFORE)
    change(now["entries"])
    return broken(BEFORE, now)


def parameters(entries: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = entries[name]["given"]["properties"]
    return found


def inserted(order: list[str]) -> None:
    order.insert(0, "new")


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a command": (lambda e: e.pop("lorasmith train"), "lorasmith train: is gone"),
    "a flag": (lambda e: parameters(e, "lorasmith train").pop("--rank"), "lorasmith train.--rank: is gone"),
    "a flag's type": (
        lambda e: parameters(e, "lorasmith train")["--rank"].update(type="flag"), "--rank: is no integer any more"
    ),
    "a name": (lambda e: e.pop("lorasmith.generate"), "lorasmith.generate: is gone"),
    "a method": (lambda e: e.pop("lorasmith.Lora.save"), "lorasmith.Lora.save: is gone"),
    "an argument": (lambda e: parameters(e, "lorasmith.train").pop("trigger"), "lorasmith.train.trigger: is gone"),
    "an argument's place": (
        lambda e: e["lorasmith.generate"]["orders"]["positional"].reverse(), "positional must begin with"
    ),
    "a new duty": (
        lambda e: e["lorasmith.generate"]["given"]["required"].append("seed"), "generate.seed: must be given, which"
    ),
    "a range": (
        lambda e: parameters(e, "settings")["rank"].update(maximum=4), "settings.rank: may not be as large as"
    ),
    "a choice": (
        lambda e: parameters(e, "settings")["objective"]["enum"].remove("x0"), "'x0' is no choice any more"
    ),
    "a node": (lambda e: e.pop("node KSampler"), "node KSampler: is gone"),
    "a new input before others": (lambda e: inserted(e["node KSampler"]["orders"]["inputs"]), "inputs must begin with"),
    "an output": (lambda e: e["node CheckpointLoaderSimple"]["orders"]["outputs"].pop(), "outputs must begin with"),
    "an endpoint": (lambda e: e.pop("GET /status"), "GET /status: is gone"),
    "a query": (lambda e: parameters(e, "GET /settings").popitem(), "is gone"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_what_is_taken_back_is_seen(case: str) -> None:
    change, sentence = BREAKS[case]
    (found,) = changed(change)
    assert sentence in found


def of_schema(before: dict[str, Any], now: dict[str, Any], key: str) -> list[str]:
    sides = [{"entries": {"it": {key: {"$ref": "a"}}}, "schemas": {"a": one}} for one in (before, now)]
    return broken(*sides)


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


NUMBER, TEXT, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}


@pytest.mark.parametrize(
    ("before", "now", "given", "answered"),
    [
        (fields(a=NUMBER), fields(a=NUMBER, b=TEXT), "", ""),
        (fields(a=NUMBER), fields(b=NUMBER), "it.a: is gone", "it.a: is gone"),
        (fields(a=NUMBER), fields(("a",), a=NUMBER), "it.a: must be given", ""),
        (fields(("a",), a=NUMBER), fields(a=NUMBER), "", "it.a: may be missing"),
        (fields(a=NUMBER), fields(a={"type": "number"}), "", "it.a: is no integer any more"),
        (fields(a=NUMBER), fields(a={"anyOf": [NUMBER, NULL]}), "", "it.a: may be null, which it was not"),
        (fields(a={"anyOf": [NUMBER, NULL]}), fields(a=NUMBER), "it.a: is no null any more", ""),
        ({"type": "array", "items": NUMBER}, {"type": "array", "items": TEXT}, "it.*: is no", "it.*: is no"),
        ({"enum": ["a", "b"]}, {"enum": ["a", "c"]}, "'b' is no choice", ""),
        (NUMBER, {}, "", "it: may be more"),
        ({}, NUMBER, "it: may be less", ""),
        (fields(a={"$ref": "a"}), fields(a={"$ref": "a"}, b=TEXT), "", ""),
    ],
)
def test_schemas_may_grow(before: dict[str, Any], now: dict[str, Any], given: str, answered: str) -> None:
    for key, sentence in (("given", given), ("answered", answered)):
        found = of_schema(before, now, key)
        assert [sentence in one for one in found][:1] == [True] * bool(sentence), found


@pytest.mark.parametrize("file", ["graph.json", "graph.ui.json"])
def test_a_graph_of_0_9_is_read(file: str, tmp_path: Path) -> None:
    load_nodes()
    prompt = read_workflow(RECORDED / file).prompt
    assert prompt == json.loads((RECORDED / "graph.json").read_text("utf-8"))
    assert len(validate(prompt, Folders(tmp_path)).nodes) == len(prompt)
