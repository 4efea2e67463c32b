"""Parsing of API-format workflow files, and overrides from `--set`.

A prompt is a JSON object of nodes by id: `{"3": {"class_type": "KSampler", "inputs": {...}, "_meta": {"title": ...}}}`.
An input is a value, or a link `["4", 0]` to output 0 of node 4. `graph` checks the content.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from lorasmith.core.errors import GraphError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.core.registry import Registry, nearest
from lorasmith.workflow.node import NODES, Node

__all__ = ["NOTES", "Prompt", "apply_overrides", "class_of", "is_remark", "node_label", "node_title", "parse_prompt"]

Prompt: TypeAlias = Mapping[str, Any]
"""Nodes by id, as in the file."""


def parse_prompt(text: str | bytes) -> dict[str, Any]:
    """The prompt in a workflow file's text, without the `{"prompt": {...}}` wrapper of API clients.

    Raises:
        GraphError: the text is not JSON, not an object, or a workflow in the editor's format.
    """
    try:
        content = parse_foreign_json(text)
    except ValueError as error:
        raise GraphError(f"a workflow file must be JSON, but this one {error}; {_EXPORT}") from error
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict) and "class_type" not in content["prompt"]:
        content = content["prompt"]
    if not isinstance(content, dict):
        raise GraphError(f"a workflow file must hold a JSON object of nodes, got {_kind(content)}; {_EXPORT}")
    if isinstance(content.get("nodes"), list):
        raise GraphError(f"a workflow file must be in API format, but this one is in the editor's format; {_EXPORT}")
    return content


def apply_overrides(prompt: Prompt, overrides: Iterable[str], *, nodes: Registry[Node] = NODES) -> dict[str, Any]:
    """A copy of `prompt` with changed inputs.

    Args:
        prompt: from `parse_prompt`.
        overrides: each `<node id>.<input>=<value>`, such as `12.steps=200`. The value is parsed as JSON if that fits
            the input, otherwise it is text.
        nodes: registered nodes, for their inputs.

    Raises:
        GraphError: an override is malformed, or names an unknown node or input.
    """
    changed = copy.deepcopy({str(key): member for key, member in prompt.items()})
    for override in overrides:
        address, equals, text = override.partition("=")
        node_id, dot, name = address.strip().partition(".")
        if not (equals and dot and name):
            raise GraphError(f"an override must be <node id>.<input>=<value>, such as 12.steps=200, got {override!r}")
        if node_id not in changed:
            known = ", ".join(node_label(key, node_title(member, nodes)) for key, member in changed.items())
            raise GraphError(
                f"override {override!r}: no node {node_id!r}{nearest(node_id, changed)}; there are {known}"
            )
        label = node_label(node_id, node_title(changed[node_id], nodes))
        _override_input(changed[node_id], name, text.strip(), label, nodes)
    return changed


def is_remark(key: str, member: Any = None) -> bool:
    """Whether a key of a prompt or of a node's inputs, or the node under it, is a remark for readers."""
    kind = member.get("class_type") if isinstance(member, dict) else None
    return key.startswith("_") if kind is None else kind in NOTES


def class_of(member: Any, nodes: Registry[Node] = NODES) -> Node | None:
    """The declaration of a prompt's node; None if the node is malformed or its class unknown."""
    class_type = member.get("class_type") if isinstance(member, dict) else None
    return nodes[class_type] if isinstance(class_type, str) and class_type in nodes else None


def node_label(node_id: str, title: str) -> str:
    """The name of a node in messages: `node 12 'Train LoRA'`, with its title from `node_title`."""
    node_id = printable(node_id, limit=_LONGEST_TITLE)
    return f"node {node_id} {title!r}" if title else f"node {node_id}"


def node_title(member: Any, nodes: Registry[Node] = NODES) -> str:
    """The title of a prompt's node in the file, or its display name, or its class; printable."""
    if not isinstance(member, dict):
        return ""
    meta, node = member.get("_meta"), class_of(member, nodes)
    title = meta.get("title") if isinstance(meta, dict) else None
    if isinstance(title, str) and title:
        return printable(title, limit=_LONGEST_TITLE)
    return node.display_name if node is not None else printable(member.get("class_type", ""), limit=_LONGEST_TITLE)


def _override_input(member: Any, name: str, text: str, label: str, nodes: Registry[Node]) -> None:
    node = class_of(member, nodes)
    slots = node.slots if node is not None else {}
    inputs = member.setdefault("inputs", {}) if isinstance(member, dict) else {}
    if not isinstance(inputs, dict):
        raise GraphError(f"{label} must have an object of inputs, got {inputs!r}; export the workflow again")
    if name not in slots and name not in inputs:
        known = list(dict.fromkeys((*slots, *inputs)))
        raise GraphError(f"{label} has no input {name!r}{nearest(name, known)}; it has {', '.join(known) or 'none'}")
    # A prompt of 123 is text, although it reads as a number.
    wants_text = name in slots and bool(kinds := slots[name].scalar_types) and {"STRING", "COMBO"}.issuperset(kinds)
    inputs[name] = _read_value(text, wants_text)


def _read_value(text: str, wants_text: bool) -> Any:
    try:
        value = parse_foreign_json(text)
    except ValueError:
        return text
    return text if wants_text and not isinstance(value, (str, list)) else value


def _kind(content: object) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number or null")


_LONGEST_TITLE = 80
NOTES = ("Note", "MarkdownNote")
"""Classes of notes in editors."""

_EXPORT = "in ComfyUI choose Workflow > Export (API) and use that file"
