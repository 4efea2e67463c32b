from __future__ import annotations

import json
from typing import Any

from lorasmith.core.errors import GraphError
from lorasmith.core.registry import Registry
from lorasmith.workflow import Node, NodeContext, NodeOutput, Output, node, object_info, socket

KEYS = {
    *("input", "input_order", "is_input_list", "output", "output_is_list", "output_name", "output_tooltips", "name"),
    *("display_name", "description", "python_module", "category", "output_node", "deprecated", "experimental"),
    "search_aliases",
}


def test_every_definition_has_the_servers_keys_and_is_json(toys: Any) -> None:
    for name, declared in toys.nodes.items():
        info = object_info(declared, toys.folders)
        assert info.keys() - {"output_matchtypes"} == KEYS
        assert info["name"] == name
        assert json.loads(json.dumps(info)) == info
        assert info["input_order"] == {group: list(members) for group, members in info["input"].items()}


def test_inputs_outputs_and_hidden_inputs(toys: Any) -> None:
    registry: Registry[Node] = Registry("node", GraphError)

    @node(
        "SaveThing",
        "Save Thing",
        "things",
        outputs=["THING", Output("INT", "count", is_list=True, tooltip="How many.")],
        hidden=["prompt", "extra_pnginfo"],
        output_node=True,
        registry=registry,
    )
    def save_thing(
        context: NodeContext,
        *,
        thing: Any = socket("THING"),
        seed: int = socket("INT", default=0, min=0, max=2**64 - 1, extras={"control_after_generate": True}),
        kind: str = socket("COMBO", options=("a", "b"), default="a", tooltip="Which."),
        steps: int | None = socket("INT", optional=True, force_input=True),
    ) -> NodeOutput:
        """Save a thing."""
        return NodeOutput()

    info = object_info(registry["SaveThing"], toys.folders)
    assert info["input"] == {
        "required": {
            "thing": ["THING", {}],
            "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}],
            "kind": ["COMBO", {"options": ["a", "b"], "default": "a", "tooltip": "Which."}],
        },
        "optional": {"steps": ["INT", {"forceInput": True}]},
        "hidden": {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]},
    }
    assert info["output"] == ["THING", "INT"]
    assert info["output_name"] == ["THING", "count"]
    assert info["output_is_list"] == [False, True]
    assert info["output_tooltips"] == [None, "How many."]
    assert info["description"] == "Save a thing."
    assert info["output_node"] is True


def test_growing_inputs_are_a_template(toys: Any) -> None:
    info = object_info(toys.nodes["MakeList"], toys.folders)
    match = {"template_id": "type", "allowed_types": "*"}
    template = {"required": {"input": ["COMFY_MATCHTYPE_V3", {"template": match}]}}
    assert info["input"]["required"] == {
        "inputs": ["COMFY_AUTOGROW_V3", {"template": {"input": template, "prefix": "input", "min": 1, "max": 10}}]
    }
    assert info["output"] == ["COMFY_MATCHTYPE_V3"]
    assert info["output_matchtypes"] == ["type"]


def test_lists_of_files_are_read_anew(toys: Any) -> None:
    (toys.folders.base / "input").mkdir()
    (toys.folders.base / "input" / "new.txt").write_text("")
    assert object_info(toys.nodes["ReadFile"], toys.folders)["input"]["required"]["file"][1]["options"][0] == "new.txt"
