"""Workflows in text: in API format or the editor's, alone or in metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorasmith.core.errors import GraphError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.registry import Registry
from lorasmith.workflow.editor_format import prompt_of_editor
from lorasmith.workflow.editor_graph import is_editor_format
from lorasmith.workflow.node import NODES, Node


class Workflow(NamedTuple):
    """The prompt that runs, and the editor's JSON of the same graph if the file has it."""

    prompt: dict[str, Any]
    editor: dict[str, Any] | None = None


def parse_workflow(text: str | bytes, *, nodes: Registry[Node] = NODES) -> Workflow:
    """The workflow in JSON of either format, or in API clients' `{"prompt": {...}}` wrapper. Raises GraphError."""
    try:
        content = parse_foreign_json(text.removeprefix(b"\xef\xbb\xbf") if isinstance(text, bytes) else text)
    except ValueError as error:
        raise GraphError(f"a workflow file must be JSON, but this one {error}; {_EXPORT}") from error
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict) and "class_type" not in content["prompt"]:
        content = content["prompt"]
    if not isinstance(content, dict):
        raise GraphError(f"a workflow file must hold a JSON object of nodes, got {_kind(content)}; {_EXPORT}")
    if is_editor_format(content):
        return Workflow(prompt_of_editor(content, nodes=nodes), content)
    return Workflow(content)


def parse_prompt(text: str | bytes, *, nodes: Registry[Node] = NODES) -> dict[str, Any]:
    """The prompt of `parse_workflow`."""
    return parse_workflow(text, nodes=nodes).prompt


def carried_workflow(entries: Mapping[str, str], *, nodes: Registry[Node] = NODES) -> Workflow | None:
    """The workflow in the metadata of a picture or LoRA, under ComfyUI's names; None if there is none.

    The prompt is what ran; the editor's JSON is converted only where there is no prompt. GraphError if it is malformed.
    """
    prompt, editor = (entries.get(name) for name in ("prompt", "workflow"))
    if prompt is None:
        return None if editor is None else parse_workflow(editor, nodes=nodes)
    found = parse_workflow(prompt, nodes=nodes)
    try:
        kept = None if editor is None else parse_foreign_json(editor)
    except ValueError:
        kept = None  # only written into the files of this run
    return Workflow(found.prompt, found.editor or (kept if is_editor_format(kept) else None))


def _kind(content: object) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number or null")


_EXPORT = "in ComfyUI choose Workflow > Save or Workflow > Export (API) and use that file"
