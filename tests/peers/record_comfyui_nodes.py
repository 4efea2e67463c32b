"""Record what ComfyUI declares of nodes, and add it to `tests/nodes/golden/comfyui_nodes.json`.

    PYTHONPATH=tests/peers python tests/peers/record_comfyui_nodes.py --comfyui PATH/TO/ComfyUI \\
        --module nodes_dataset --out tests/nodes/golden/comfyui_nodes.json [--only NODE ...]

Needs an environment with ComfyUI's requirements. Nodes are those of one module of `comfy_extras` that declares them as
schemas. Lists that depend on the files of an installation are recorded as "files".
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from typing import Any

import comfyui_headless

_KEPT = ("default", "min", "max", "step", "multiline", "forceInput", "options")
_FILES = {"folder", "folder_name"}
"""Choices whose options are files."""


def main() -> None:
    arguments = comfyui_headless.booted(
        __doc__,
        module={"required": True, "help": "module of comfy_extras"},
        only={"nargs": "*", "help": "nodes to record; all of the module by default"},
    )
    module = importlib.import_module(f"comfy_extras.{arguments.module}")
    made = module.comfy_entrypoint()  # of one module no coroutine
    extension = asyncio.run(made) if inspect.iscoroutine(made) else made
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.GET_SCHEMA()
        if arguments.only is None or schema.node_id in arguments.only:
            found[schema.node_id] = _declared(schema)
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    arguments.out.write_text(json.dumps(dict(sorted({**known, **found}.items())), indent=1) + "\n", encoding="utf-8")
    print(", ".join(found))


def _declared(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": {one.id: _input(one) for one in schema.inputs},
        "outputs": [
            {"type": one.io_type, "name": one.display_name or one.io_type, "is_list": bool(one.is_output_list)}
            for one in schema.outputs
        ],
        "is_input_list": bool(schema.is_input_list),
        "output_node": bool(schema.is_output_node),
        "deprecated": bool(schema.is_deprecated),
    }


def _input(declared: Any) -> dict[str, Any]:
    said = {key: value for key, value in declared.as_dict().items() if key in _KEPT and value is not None}
    if "options" in said:
        said["options"] = "files" if declared.id in _FILES else list(said["options"])
    kind = "optional" if declared.optional else "required"
    return {"kind": kind, "type": declared.io_type, **said}


if __name__ == "__main__":
    main()
