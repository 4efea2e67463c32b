"""Node definitions in the format of a ComfyUI server's `/object_info`, for editors and API clients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.workflow.node import Node
from lorasmith.workflow.sockets import MATCH, Input


def object_info(node: Node, folders: Folders) -> dict[str, Any]:
    """The definition of `node` as JSON values, with the current choices of the folders."""
    inputs: dict[str, dict[str, list[Any]]] = {
        "required": _inputs((one for one in node.inputs if not one.optional), folders),
        "optional": _inputs((one for one in node.inputs if one.optional), folders),
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
    return {one.name: _growing(one, folders) if one.grow else [one.type, _options(one, folders)] for one in inputs}


def _options(one: Input, folders: Folders) -> dict[str, Any]:
    values = {
        "tooltip": one.tooltip or None,
        "default": one.default,
        "min": one.min,
        "max": one.max,
        "step": one.step,
        "multiline": one.multiline,
        "forceInput": one.force_input or None,
        "advanced": one.advanced or None,
        "options": list(one.choices(folders)) if "COMBO" in one.scalar_types else None,
        "template": {"template_id": _TEMPLATE, "allowed_types": "*"} if one.type == MATCH else None,
    }
    return {key: value for key, value in values.items() if value is not None} | dict(one.extras)


def _growing(one: Input, folders: Folders) -> list[Any]:
    assert one.grow is not None
    element = [one.type, _options(one, folders)]
    named = {"names": list(one.grow.names)} if one.grow.names else {"prefix": one.grow.prefix, "max": one.grow.max}
    template = {"input": {"required": {one.grow.prefix: element}}, "min": one.grow.min, **named}
    return ["COMFY_AUTOGROW_V3", {"template": template}]


_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID"}
_TEMPLATE = "type"
