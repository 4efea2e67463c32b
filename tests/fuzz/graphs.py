"""Workflows in both formats, alone or in a picture, damaged and checked, seldom run."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.folders import ASSETS, Folders
from lorasmith.nodes import load_nodes
from lorasmith.nodes.workflow_run import read_workflow
from lorasmith.workflow import apply_overrides, parse_prompt
from lorasmith.workflow.graph import examine
from tests.fuzz.engine import Door, FaultError, command, printed
from tests.fuzz.mutators import damaged_bytes, damaged_json, json_bytes, nasty_text
from tests.workflow.editor_cases import CASES

_EXAMPLES = ASSETS / "examples"
_STRINGS = {
    "1": {"class_type": "PrimitiveString", "inputs": {"value": "a"}, "_meta": {"title": "Text"}},
    "2": {"class_type": "StringConcatenate", "inputs": {"string_a": ["1", 0], "string_b": "b", "delimiter": ","}},
    "3": {"class_type": "StringReplace", "inputs": {"string": ["2", 0], "find": "a", "replace": "b"}},
    "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
}
"""A graph of text alone, which runs at once."""


def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
    """A damaged workflow, checked; one of text is run."""
    if rng.random() < 0.1:
        file = folder / f"{nasty_text(rng)[:40].translate(_UNUSABLE) or 'graph'}.json"
        file.write_bytes(_written(rng, _STRINGS))
        return [("run", lambda: command("run", file, "--base-dir", folder))]
    draw = rng.random()
    graph = _grown(rng) if draw < 0.05 else _nested(rng) if draw < 0.08 else rng.choice(_examples())
    data = _written(rng, graph)
    if rng.random() < 0.05:
        picture = folder / "graph.png"
        picture.write_bytes(_carrying(rng, data))
        return [("picture", lambda: _checked(json_bytes(read_workflow(picture).prompt), folder, []))]
    found: list[Door] = [("check", lambda: _checked(data, folder, []))]
    if rng.random() < 0.1:
        override = (
            f"{rng.choice(('1', '3', nasty_text(rng)))}.{rng.choice(('steps', nasty_text(rng)))}={nasty_text(rng)}"
        )
        found.append(("override", lambda: _checked(data, folder, [override])))
    return found


_UNUSABLE = {ord(one): "_" for one in "/\x00"} | dict.fromkeys(range(55296, 57344), "_")


def _checked(data: bytes, folder: Path, overrides: list[str]) -> str:
    nodes = load_nodes()
    found = examine(apply_overrides(parse_prompt(data), overrides, nodes=nodes), Folders(folder), nodes=nodes)
    said = [*map(str, found.faults), *found.graph.warnings]
    if (longest := max(map(len, said), default=0)) > 400:
        raise FaultError("a finding has more than 400 characters", longest)
    return printed(*said)


def _written(rng: random.Random, prompt: Any) -> bytes:
    data = json_bytes(damaged_json(rng, prompt))
    if rng.random() < 0.3:
        data = json_bytes(_relinked(rng, prompt))
    return damaged_bytes(rng, data) if rng.random() < 0.15 else data


def _relinked(rng: random.Random, prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with links to other places: outputs that are none, unknown nodes, circles, other types."""
    changed: dict[str, Any] = json.loads(json.dumps(prompt))
    if isinstance(links := changed.get("links"), list) and links:
        for _ in range(rng.choice((1, 1, 2, 6))):
            rng.choice(links)[rng.randrange(5)] = rng.choice((0, 1, -1, 99, "5", None, -10, -20, 10**30))
        return changed
    nodes = [one for one in changed.values() if isinstance(one, dict) and one.get("inputs")]
    if not nodes:
        return changed
    for _ in range(rng.choice((1, 1, 2, 6))):
        inputs = rng.choice(nodes)["inputs"]
        output = rng.choice((0, 1, -1, 99, 0.5, True, None, "0", 10**30))
        target: Any = rng.choice((*changed, "nobody", 3, None, ["3", 0]))
        inputs[rng.choice(list(inputs))] = rng.choice(([target, output], [target], [target, output, 0]))
    return changed


def _grown(rng: random.Random) -> dict[str, Any]:
    """Many nodes: of unknown classes, in a chain, in a circle, or all linked to one."""
    count = rng.choice((100, 1000, 3000))
    kind = rng.choice(("PreviewAny", "StringConcatenate", "Nothing"))
    field = {"PreviewAny": "source"}.get(kind, "string_a")
    place = rng.choice(("1", "before", "after"))
    target = {"1": lambda n: "1", "before": lambda n: str(n - 1), "after": lambda n: str(n + 1)}[place]
    return {str(n): {"class_type": kind, "inputs": {field: [target(n), 0]}} for n in range(1, count)}


@functools.cache
def _examples() -> list[Any]:
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_EXAMPLES.glob("*.json"))]
    return [*files, *(case for name, case in sorted(CASES.items()) if "definitions" in case)]


def _nested(rng: random.Random) -> dict[str, Any]:
    """Subgraphs in one another, with several instances of each, of which one may contain itself."""
    depth, within, back = rng.choice((3, 20, 60)), rng.choice((1, 2, 10)), rng.choice((0, 0, 1))
    inner = [
        {"id": str(one), "nodes": [{"id": key, "type": str(one + 1)} for key in range(within)]} for one in range(depth)
    ]
    last = [{"id": 1, "type": "0" if back else "PreviewAny"}]
    definitions = [*inner, {"id": str(depth), "nodes": last}]
    return {"nodes": [{"id": 1, "type": "0"}], "links": [], "definitions": {"subgraphs": definitions}}


def _carrying(rng: random.Random, data: bytes) -> bytes:
    """A PNG with the text in one of its chunks, sometimes damaged."""
    entries, file = PngInfo(), io.BytesIO()
    text, name = data.decode("utf-8", "replace"), rng.choice(("prompt", "workflow"))
    (entries.add_itxt if rng.random() < 0.5 else entries.add_text)(name, text, zip=rng.random() < 0.3)
    Image.new("L", (2, 2)).save(file, "PNG", pnginfo=entries)
    return damaged_bytes(rng, file.getvalue()) if rng.random() < 0.5 else file.getvalue()
