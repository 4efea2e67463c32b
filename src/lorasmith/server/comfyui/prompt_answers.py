"""A ComfyUI server's response to a prompt: which outputs run, and the faults of the others.

An output runs if no node that it depends on has a fault. If at least one runs, the response is a success that lists the
faults of the others; if none runs, or a node that an output depends on has an unknown class, the prompt is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.server.graph_ends import error_entry
from lorasmith.workflow.graph import Examination, Finding, examine
from lorasmith.workflow.node import Node
from lorasmith.workflow.object_info import object_info
from lorasmith.workflow.prompt import Prompt, class_of, is_remark, node_title


@dataclass(frozen=True)
class PromptAnswer:
    """The result of checking a prompt; errors are in the protocol's form."""

    outputs: tuple[str, ...]  # ids of the output nodes that run; empty if the prompt is refused
    error: dict[str, Any] | None = None  # why the prompt is refused; None if it runs
    node_errors: dict[str, Any] = field(default_factory=dict)  # by node id
    warnings: tuple[str, ...] = ()  # sentences about what is ignored


def answer_to(
    prompt: Prompt, folders: Folders, *, nodes: Registry[Node], targets: Collection[str] | None = None
) -> PromptAnswer:
    """Check a prompt. `targets` are the ids of the output nodes to run, None for all."""
    try:
        examination = examine(prompt, folders, nodes=nodes, targets=targets)
    except LorasmithError as error:
        return PromptAnswer((), error_entry("invalid_prompt", str(error)))
    faults, graph = examination.faults, examination.graph
    left_out = _left_out(prompt, faults, nodes)
    if not faults:
        return PromptAnswer(graph.outputs, None, left_out, graph.warnings)
    users = _users(prompt)
    faulty = dict.fromkeys(one.node_id for one in faults if one.node_id is not None)
    errors = {key: _node_entry(key, faults, prompt, users, examination, folders, nodes) for key in [*faulty][:_LISTED]}
    spoiled = _reached(faulty, users)
    good = tuple(key for key in graph.outputs if key not in spoiled)
    refusal = _refusal(faults, good, prompt, nodes)
    if refusal is not None:
        return PromptAnswer((), refusal, left_out | errors, graph.warnings)
    return PromptAnswer(good, None, left_out | errors, graph.warnings)


def _refusal(
    faults: Sequence[Finding], good: Sequence[str], prompt: Prompt, nodes: Registry[Node]
) -> dict[str, Any] | None:
    """Why no output runs; None if some do."""
    unknown = next((one for one in faults if one.kind == "missing_node_type"), None)
    if unknown is not None and unknown.node_id is not None:
        member = prompt.get(unknown.node_id)
        names = {"node_id": unknown.node_id, "class_type": _class_name(member), "node_title": node_title(member, nodes)}
        return error_entry("missing_node_type", str(unknown), f"Node ID '#{unknown.node_id}'", **names)
    if good:
        return None
    whole = next((one for one in faults if one.node_id is None), None)
    if whole is not None:
        return error_entry(whole.kind, str(whole))
    sentences = [str(one) for one in faults[:_LISTED]]
    return error_entry("prompt_outputs_failed_validation", "no output of this workflow can run", "\n".join(sentences))


def _left_out(prompt: Prompt, faults: Sequence[Finding], nodes: Registry[Node]) -> dict[str, Any]:
    """Errors of nodes of unknown classes on which no known output depends; they may be outputs, and do not run."""
    needed = {one.node_id for one in faults}
    found = {}
    for key, member in prompt.items():
        if key in needed or is_remark(str(key), member) or class_of(member, nodes) is not None:
            continue
        name = _class_name(member)
        error = error_entry("missing_node_type", _TITLES["missing_node_type"], f"{name!r} is left out")
        found[str(key)] = {"errors": [error], "dependent_outputs": [], "class_type": name or ""}
        if len(found) == _LISTED:
            break
    return found


def _node_entry(
    key: str,
    faults: Sequence[Finding],
    prompt: Prompt,
    users: Mapping[str, Sequence[str]],
    examination: Examination,
    folders: Folders,
    nodes: Registry[Node],
) -> dict[str, Any]:
    member = prompt.get(key)
    spoiled = _reached([key], users)
    own = [one for one in faults if one.node_id == key][:_LISTED]
    return {
        "errors": [_input_error(one, member, folders, nodes) for one in own],
        "dependent_outputs": [output for output in examination.graph.outputs if output in spoiled],
        "class_type": _class_name(member) or "",
    }


def _input_error(fault: Finding, member: Any, folders: Folders, nodes: Registry[Node]) -> dict[str, Any]:
    message = _TITLES.get(fault.kind, "The node cannot run")
    if fault.input_name is None:
        return error_entry(fault.kind, message, fault.sentence)
    extra: dict[str, Any] = {"input_name": fault.input_name}
    node = class_of(member, nodes)
    if node is not None:
        extra["input_config"] = _input_config(node, fault.input_name, folders)
    given = member.get("inputs", {}) if isinstance(member, dict) else {}
    if fault.input_name in given:
        extra["received_value"] = _bounded(given[fault.input_name])
        if fault.kind == "return_type_mismatch":
            extra["linked_node"] = given[fault.input_name]
    return error_entry(fault.kind, message, f"{fault.input_name}: {fault.sentence}", **extra)


def _input_config(node: Node, name: str, folders: Folders) -> list[Any] | None:
    """The declaration of an input as in `/object_info`; None for one with a long list of choices."""
    groups = object_info(node, folders)["input"]
    config = groups["required"].get(name) or groups.get("optional", {}).get(name)
    if config is None or len(config[1].get("options", ())) > _MOST_CHOICES:
        return None
    return list(config)


def _bounded(value: Any) -> Any:
    """A value for a response: long texts and large structures are shortened."""
    if isinstance(value, (int, float)) or value is None:
        return value
    text = value if isinstance(value, str) else repr(value)[: _LONGEST + 1]
    return value if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _users(prompt: Prompt) -> dict[str, list[str]]:
    """By node, the nodes that it is linked to."""
    users: dict[str, list[str]] = {}
    for key, member in prompt.items():
        for source in _sources(member):
            users.setdefault(source, []).append(str(key))
    return users


def _sources(member: Any) -> Iterator[str]:
    inputs = member.get("inputs") if isinstance(member, dict) else None
    for value in inputs.values() if isinstance(inputs, dict) else ():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)):
            yield str(value[0])


def _reached(start: Collection[str], users: Mapping[str, Sequence[str]]) -> set[str]:
    """`start` and every node that depends on it."""
    reached, waiting = set(start), deque(start)
    while waiting:
        for user in users.get(waiting.popleft(), ()):
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return reached


def _class_name(member: Any) -> str | None:
    name = member.get("class_type") if isinstance(member, dict) else None
    return name if isinstance(name, str) else None


_LISTED, _MOST_CHOICES, _LONGEST = 50, 20, 1000
_TITLES = {
    "bad_linked_input": "The link of an input is broken",
    "dependency_cycle": "The node depends on its own output",
    "invalid_input_type": "The value of an input has the wrong type",
    "missing_node_type": "The class of the node is unknown",
    "required_input_missing": "A required input is missing",
    "return_type_mismatch": "The type of a linked output does not fit",
    "value_bigger_than_max": "A value is above its maximum",
    "value_not_in_list": "A value is not in the list",
    "value_smaller_than_min": "A value is below its minimum",
}
