"""Workflows from files: JSON, pictures and LoRAs with a workflow in their metadata, and the examples."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from lorasmith.core.errors import GraphError
from lorasmith.core.files import read_regular
from lorasmith.core.registry import Registry
from lorasmith.formats.container import check_safetensors
from lorasmith.nodes.example_workflows import EXAMPLE_PREFIX, example_named
from lorasmith.workflow.node import NODES, Node
from lorasmith.workflow.workflow_text import Workflow, carried_workflow, parse_workflow


def read_workflow(path: str | os.PathLike[str], *, nodes: Registry[Node] = NODES) -> Workflow:
    """The workflow in a JSON file (either format), a PNG, a LoRA, or `example:<name>`. Raises GraphError."""
    name = os.fspath(path)
    if name.startswith(EXAMPLE_PREFIX):
        # In the editor's format, so that files which the graph saves can be opened there.
        path = example_named(name.removeprefix(EXAMPLE_PREFIX)).editor_path
    path = Path(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return _carried(check_safetensors(path, GraphError).metadata, path, nodes)
        content = read_regular(path)
    except OSError as error:
        raise GraphError(f"{path} cannot be read ({error.strerror}); give {_KINDS}") from error
    if content.startswith(_PNG):
        return _carried(_png_entries(content, path), path, nodes)
    return parse_workflow(content, nodes=nodes)


def _carried(entries: Mapping[str, str], path: Path, nodes: Registry[Node]) -> Workflow:
    found = carried_workflow(entries, nodes=nodes)
    if found is None:
        raise GraphError(f"{path.name} carries no workflow, only files that a graph saved do; give {_KINDS}")
    return found


def _png_entries(content: bytes, path: Path) -> dict[str, str]:
    """Text chunks of a PNG, without decoding its pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            return {str(key): str(text) for key, text in picture.info.items() if isinstance(text, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GraphError(f"{path.name} is not a PNG that can be read; save the picture again") from error


_PNG = b"\x89PNG\r\n\x1a\n"
_KINDS = "a workflow (.json), a PNG or LoRA that a graph saved, or example:NAME"
