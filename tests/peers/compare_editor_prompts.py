"""Compare our conversion of files in the editor's format with the editor's own, and with comfyui-autograph's.

    PYTHONPATH=tests/peers python tests/peers/compare_editor_prompts.py RECORDED FILE.json ...

`RECORDED` is a folder that `record_editor_prompts.py` filled from the same files. Names of widgets come from the
server's node definitions in it, not from our nodes. With comfyui-autograph installed, its conversions are counted too.
Files that the editor does not read as meant are counted apart: nodes or choices that the server does not know have
none of their widgets there, so that the values after them move. Values that widgets of the page make themselves (3D
views, comparisons of pictures) are not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.workflow.editor_format import prompt_of_editor
from lorasmith.workflow.editor_graph import SEEDS, without_missing_controls

WIDGETS = frozenset(
    """INT FLOAT STRING BOOLEAN COMBO MARKDOWN COLOR BOUNDING_BOX CURVE RANGE TEXTAREA COLORS IMAGECOMPARE AUDIO_UI
    AUDIOUPLOAD LOAD_3D LOAD_3D_ANIMATION WEBCAM AUDIO_RECORD BOUNDING_BOXES COMFY_DYNAMICCOMBO_V3""".split()  # noqa: SIM905
)
OF_THE_PAGE = re.compile("3D|ImageCompare|SaveGLB|CustomCombo|Painter|WebcamCapture|AudioRecord|Preview")
"""Classes whose widgets the page fills."""

Definitions = Mapping[str, Any]
Prompt = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    definitions = json.loads((arguments.recorded / "object_info.json").read_text(encoding="utf-8"))
    names, others = names_in(definitions), _autograph(definitions)
    tally: Counter[str] = Counter()
    for file in arguments.files:
        recorded = arguments.recorded / file.name
        content = json.loads(file.read_text(encoding="utf-8"))
        if not recorded.is_file() or not isinstance(content, dict) or "nodes" not in content:
            tally["not a graph, or refused by the editor"] += 1
            continue
        ours = _plain(prompt_of_editor(content, names=names), definitions)
        editors = _plain(json.loads(recorded.read_text(encoding="utf-8")), definitions)
        verdict = "equal" if _shape(ours) == _shape(editors) else "different"
        if verdict == "different":
            unread = _unread(content, definitions, names)
            verdict += f", the server does not know {'its nodes' if unread == 'node' else 'its choices'}" * bool(unread)
            print(f"{file.name}: {verdict}: {'; '.join(_differences(ours, editors)[:3])[:400]}")
        tally[f"editor: {verdict}"] += 1
        if others is not None:
            same = _shape(ours, known=definitions) == _shape(_plain(others(content), definitions))
            tally[f"autograph: {'equal' if same else 'different'} (editor: {verdict.partition(',')[0]})"] += 1
    print(*(f"{count:5} {what}" for what, count in sorted(tally.items())), sep="\n")


def names_in(definitions: Definitions) -> Callable[[str, Sequence[Any]], list[str | None] | None]:
    """Names of values by a server's definitions, with the inputs that a chosen option adds."""

    def add(prefix: str, inputs: Mapping[str, Any], values: Sequence[Any], found: list[str | None]) -> int:
        forced = 0
        for name, kind, options in _inputs(inputs):
            if kind not in WIDGETS:
                continue
            if options.get("forceInput"):
                forced += 1
                continue
            place = len(found)
            found.append(prefix + name)
            if kind == "INT" and options.get("control_after_generate", name in SEEDS):
                found.append(None)
            if kind == "COMBO" and options.get("control_after_generate"):
                found += [None, None]
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = values[place] if place < len(values) else options["options"][0]["key"]
                for one in options["options"]:
                    if one["key"] == chosen:
                        add(f"{prefix}{name}.", one["inputs"], values, found)
        return forced

    def names(kind: str, values: Sequence[Any]) -> list[str | None] | None:
        if kind not in definitions:
            return None
        found: list[str | None] = []
        add("", definitions[kind]["input"], values, found)
        return without_missing_controls(found, values)

    return names


def _inputs(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name, type of widget and options of each input, required ones first."""
    for group in ("required", "optional"):
        for name, declared in (inputs.get(group) or {}).items():
            options = declared[1] if len(declared) > 1 and isinstance(declared[1], dict) else {}
            kind = "COMBO" if isinstance(declared[0], list) else declared[0]
            yield name, options.get("widgetType") or kind, {"options": declared[0], **options}


def _plain(prompt: Prompt, definitions: Definitions) -> Prompt:
    """The prompt without titles and values of the page, with defaults, lists as lists, and whole numbers as such."""
    found = {}
    for key, member in prompt.items():
        kind = member.get("class_type")
        inputs = dict(member["inputs"])
        _fill(inputs, "", definitions[kind]["input"] if kind in definitions else {})
        if kind not in definitions or OF_THE_PAGE.search(kind):
            inputs = {name: value for name, value in inputs.items() if _is_link(value, prompt)}
        inputs = {name: _number(value) for name, value in inputs.items() if value is not None}
        found[str(key)] = {"class_type": kind if kind in definitions else None, "inputs": inputs}
    return found


def _fill(values: dict[str, Any], prefix: str, inputs: Mapping[str, Any]) -> None:
    """Add the defaults of missing values, those of chosen options included."""
    for name, widget, options in _inputs(inputs):
        default = _default(widget, options)
        if widget in WIDGETS and default is not None and values.get(prefix + name) is None:
            values[prefix + name] = default
        if widget == "COMFY_DYNAMICCOMBO_V3":
            for one in options["options"]:
                if one["key"] == values.get(prefix + name):
                    _fill(values, f"{prefix}{name}.", one["inputs"])


def _default(widget: str, options: Mapping[str, Any]) -> Any:
    choices = options["options"] if isinstance(options["options"], list) else []
    if "default" in options:
        return options["default"]
    if widget == "COMFY_DYNAMICCOMBO_V3":
        return choices[0]["key"] if choices else None
    if widget == "COMBO":
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}.get(widget)


def _number(value: Any) -> Any:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    if isinstance(value, list):
        return [_number(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_link(value: Any, prompt: Prompt) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt and isinstance(value[1], int)


def _shape(prompt: Prompt, known: Definitions | None = None) -> Counter[str]:
    """What a prompt computes, whatever its ids: each node as a digest of its inputs and of what they are linked to."""
    digests: dict[str, str] = {}

    def digest(key: str, above: tuple[str, ...] = ()) -> str:
        if key in above:
            return "circle"
        if key not in digests:
            member = prompt[key]
            inputs = {
                name: ["link", digest(str(value[0]), (*above, key)), value[1]] if _is_link(value, prompt) else value
                for name, value in sorted(member["inputs"].items())
            }
            text = json.dumps([member["class_type"], inputs], sort_keys=True)
            digests[key] = hashlib.sha256(text.encode()).hexdigest()
        return digests[key]

    return Counter(digest(key) for key, one in prompt.items() if known is None or one["class_type"] in known)


def _unread(content: Any, definitions: Definitions, names: Callable[..., Any]) -> str:
    """Whether the file has nodes that the server does not know ("node"), or choices ("choice")."""
    graphs = [content, *content.get("definitions", {}).get("subgraphs", [])]
    ids, found = {one.get("id") for one in graphs}, ""
    virtual = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
    for member in (one for graph in graphs for one in graph["nodes"]):
        if member["type"] in ids or member["type"] in virtual:
            continue
        if member["type"] not in definitions:
            return "node"
        values = member.get("widgets_values") or []
        declared = {name: (kind, options) for name, kind, options in _inputs(definitions[member["type"]]["input"])}
        known = names(member["type"], values) or []
        dotted = [one["name"] for one in member.get("inputs", []) if "." in one["name"]]
        missing = [one["name"] for one in member.get("inputs", []) if one["name"].partition(".")[0] not in declared]
        if isinstance(values, list) and (
            len(values) > len(known) + 2 or missing or (dotted and len(values) > len(known))
        ):
            found = "choice"
        for name, value in zip(known, values if isinstance(values, list) else [], strict=False):
            kind, options = declared.get(name, ("", {}))
            if kind == "COMFY_DYNAMICCOMBO_V3" and value not in [one["key"] for one in options["options"]]:
                found = "choice"
    return found


def _differences(ours: Prompt, editors: Prompt) -> list[str]:
    found = [f"{key} only in one" for key in sorted(ours.keys() ^ editors.keys())]
    for key in ours.keys() & editors.keys():
        one, other = ours[key]["inputs"], editors[key]["inputs"]
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                found.append(f"{key} {ours[key]['class_type']}.{name}: {one.get(name)!r} not {other.get(name)!r}")
    return found


def _autograph(definitions: Definitions) -> Callable[[Any], Prompt] | None:
    """Its conversion; choices of files are left open, as it drops values that a server does not list."""
    try:
        from autograph.convert import workflow_to_api_format_with_errors
    except ImportError:
        return None
    open_choices = json.loads(json.dumps(definitions))
    for one in open_choices.values():
        for group in one["input"].values():
            for declared in group.values() if isinstance(group, dict) else ():
                if isinstance(declared, list) and isinstance(declared[0], list):
                    declared[:] = ["COMBO", {**(declared[1] if len(declared) > 1 else {}), "options": []}]
                elif isinstance(declared, list) and declared[0] == "COMBO" and len(declared) > 1:
                    declared[1]["options"] = []

    def convert(content: Any) -> Prompt:
        return workflow_to_api_format_with_errors(json.loads(json.dumps(content)), open_choices, True).data or {}

    return convert


if __name__ == "__main__":
    main()
