"""The node reference, and node definitions in the format of a ComfyUI server's `/object_info`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry, nearest
from lorasmith.workflow.node import Node
from lorasmith.workflow.sockets import MATCH, Input


def nodes_by_category(nodes: Registry[Node]) -> Iterator[tuple[str, list[Node]]]:
    """The nodes of each category, both in alphabetical order, without deprecated ones."""
    ordered = sorted(
        (node for _, node in nodes.items() if not node.deprecated), key=lambda node: (node.category, node.id.casefold())
    )
    for category, members in itertools.groupby(ordered, key=lambda node: node.category):
        yield category, [*members]


def find_node(name: str, nodes: Registry[Node]) -> Node:
    """The node of a class, alias or unique title, ignoring case. GraphError if there is none, or several."""
    if (name := name.strip()) in nodes:
        return nodes[name]
    titled = [node for _, node in nodes.items() if node.display_name.casefold() == name.casefold()]
    if len(titled) > 1:
        shown = ", ".join(node.id for node in titled)
        raise GraphError(f"{len(titled)} nodes are called {name!r}; give a class: {shown}")
    if not titled:
        hint = nearest(name, [*nodes, *(node.display_name for _, node in nodes.items())])
        raise GraphError(f"unknown node {name!r}{hint}; `lorasmith nodes` lists all")
    return titled[0]


def input_facts(slot: Input, choices: Sequence[str] = ()) -> list[str]:
    """Type, default, range and choices (of a COMBO) of an input, a few words each."""
    facts = ["any type" if slot.type == "*" else "choice" if slot.type == "COMBO" else slot.type]
    if slot.grow is not None:
        facts.append(f"repeated {slot.grow.min} to {len(slot.grow.suffixes)} times")
    if slot.default is not None:
        facts.append(f"default {slot.default!r}")
    if slot.min is not None or slot.max is not None:
        bounds = (
            f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}"
            for word, bound in (("from", slot.min), ("to", slot.max))
            if bound is not None
        )
        facts.append(" ".join(bounds))
    if choices:
        facts.append(f"one of {', '.join(choices)}")
    return facts


def badges(node: Node) -> list[str]:
    """Properties of a node as a whole, such as deprecated."""
    marks = {"output": node.output_node, "experimental": node.experimental, "deprecated": node.deprecated}
    return [name for name, is_so in marks.items() if is_so]


def object_info(node: Node, folders: Folders) -> dict[str, Any]:
    """The definition of `node` as JSON values, with the current choices of the folders."""
    inputs: dict[str, dict[str, list[Any]]] = {
        "required": _inputs((slot for slot in node.inputs if not slot.optional), folders),
        "optional": _inputs((slot for slot in node.inputs if slot.optional), folders),
        "hidden": {name: [_HIDDEN[name]] for name in node.hidden},
    }
    inputs = {group: members for group, members in inputs.items() if members or group == "required"}
    info = {
        "input": inputs,
        "input_order": {group: list(members) for group, members in inputs.items()},
        "is_input_list": node.is_input_list,
        "output": [output.type for output in node.outputs],
        "output_is_list": [output.is_list for output in node.outputs],
        "output_name": [output.label for output in node.outputs],
        "output_tooltips": [output.tooltip or None for output in node.outputs],
        "name": node.id,
        "display_name": node.display_name,
        "description": node.description,
        # Editors treat modules below `nodes` as nodes of the program itself.
        "python_module": node.function.__module__.removeprefix("lorasmith."),
        "category": node.category,
        "output_node": node.output_node,
        "deprecated": node.deprecated,
        "experimental": node.experimental,
        "search_aliases": list(node.search_aliases),
    }
    if any(output.type == MATCH for output in node.outputs):
        info["output_matchtypes"] = [_TEMPLATE if output.type == MATCH else None for output in node.outputs]
    return info


def _inputs(inputs: Iterable[Input], folders: Folders) -> dict[str, list[Any]]:
    return {
        slot.name: _growing(slot, folders) if slot.grow else [slot.type, _options(slot, folders)] for slot in inputs
    }


def _options(slot: Input, folders: Folders) -> dict[str, Any]:
    values = {
        "tooltip": slot.tooltip or None,
        "default": slot.default,
        "min": slot.min,
        "max": slot.max,
        "step": slot.step,
        "multiline": slot.multiline,
        "forceInput": slot.force_input or None,
        "advanced": slot.advanced or None,
        "options": list(slot.choices(folders)) if "COMBO" in slot.scalar_types else None,
        "template": {"template_id": _TEMPLATE, "allowed_types": "*"} if slot.type == MATCH else None,
    }
    return {key: value for key, value in values.items() if value is not None} | dict(slot.extras)


def _growing(slot: Input, folders: Folders) -> list[Any]:
    assert slot.grow is not None
    element = [slot.type, _options(slot, folders)]
    named = {"names": list(slot.grow.names)} if slot.grow.names else {"prefix": slot.grow.prefix, "max": slot.grow.max}
    template = {"input": {"required": {slot.grow.prefix: element}}, "min": slot.grow.min, **named}
    return ["COMFY_AUTOGROW_V3", {"template": template}]


_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"}
_TEMPLATE = "type"
