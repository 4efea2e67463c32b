"""Prompts in the API format of workflow files, and overrides from `--set`.

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

Prompt: TypeAlias = Mapping[str, Any]  # nodes by id, as in the file


def apply_overrides(prompt: Prompt, overrides: Iterable[str], *, nodes: Registry[Node] = NODES) -> dict[str, Any]:
    """A copy of `prompt` with changed inputs, each `<node>.<input>=<value>`, such as `12.steps=200`.

    The node is an id, or a title or class that one node alone has. The value is parsed as JSON if that fits the input,
    otherwise it is text. GraphError if an override is malformed, or names an unknown node or input.
    """
    changed = copy.deepcopy({str(key): member for key, member in prompt.items()})
    for override in overrides:
        address, equals, text = override.partition("=")
        if not (equals and address.strip().partition(".")[2]):
            raise GraphError(
                f"an override must be <node>.<input>=<value>, such as 12.steps=200 or Train LoRA.steps=200, "
                f"got {override!r}"
            )
        node_id, name = _addressed(changed, address.strip(), override, nodes)
        label = node_label(node_id, node_title(changed[node_id], nodes))
        _override_input(changed[node_id], name, text.strip(), label, nodes)
    return changed


def _addressed(prompt: Prompt, address: str, override: str, nodes: Registry[Node]) -> tuple[str, str]:
    """Id of the node and name of the input in an address; titles and inputs may contain dots."""
    parts = [(address[:place], address[place + 1 :]) for place, one in enumerate(address) if one == "."]
    parts = [(node, name) for node, name in parts if node and name]
    for node, name in parts:
        if node in prompt:
            return node, name
    titles = {key: node_title(member, nodes) for key, member in prompt.items()}
    classes = {key: member.get("class_type") for key, member in prompt.items() if isinstance(member, dict)}
    for named in (titles, classes):
        for node, name in reversed(parts):
            found = [key for key, one in named.items() if one == node]
            if len(found) > 1:
                shown = ", ".join(printable(key, limit=_LONGEST_TITLE) for key in found[:_LISTED])
                raise GraphError(f"override {override!r}: {len(found)} nodes are called {node!r}; use an id: {shown}")
            if found:
                return found[0], name
    wanted = parts[0][0] if parts else address
    known = ", ".join(node_label(key, titles[key]) for key in [*prompt][:_LISTED])
    more = f" and {len(prompt) - _LISTED:,} more" if len(prompt) > _LISTED else ""
    hint = nearest(wanted, {*prompt, *titles.values()} - {""})
    raise GraphError(f"override {override!r}: no node {wanted!r}{hint}; there are {known or 'none'}{more}")


def is_remark(key: str, member: Any) -> bool:
    """Whether a value in a prompt is not a node: a note, or an addition beside the nodes."""
    if not isinstance(member, dict):
        return True
    kind = member.get("class_type")
    return key.startswith("_") or "inputs" not in member if kind is None else kind in NOTES


def class_of(member: Any, nodes: Registry[Node] = NODES) -> Node | None:
    """The declaration of a prompt's node; None if the node is malformed or its class unknown."""
    class_type = member.get("class_type") if isinstance(member, dict) else None
    return nodes[class_type] if isinstance(class_type, str) and class_type in nodes else None


def node_label(node_id: str, title: str) -> str:
    """The name of a node in messages: `node 12 'Train LoRA'`, with its title from `node_title`."""
    node_id = printable(node_id, limit=_LONGEST_TITLE)
    return f"node {node_id} {title!r}" if title else f"node {node_id}"


def node_title(member: Any, nodes: Registry[Node] = NODES) -> str:
    """The node's title in the file, or its display name, or its class; printable."""
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


_LONGEST_TITLE, _LISTED = 80, 50
NOTES = ("Note", "MarkdownNote")  # classes
