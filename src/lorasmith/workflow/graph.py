"""Prompts in the API format of workflow files, and their validation: all faults at once, and a graph for the executor.

A prompt is a JSON object of nodes by id: `{"3": {"class_type": "KSampler", "inputs": {...}, "_meta": {"title": ...}}}`.
An input is a value, or a link `["4", 0]` to output 0 of node 4.

Faults in nodes that no output needs are warnings, as such nodes never run; so are unknown inputs, and required inputs
that are missing but have a default. Notes of editors, keys that begin with an underscore and values that are not nodes
are ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from lorasmith.core.errors import GraphError, LorasmithError
from lorasmith.core.folders import Folders
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import count_text, printable
from lorasmith.core.printable import sentence as shortened
from lorasmith.core.registry import Registry, nearest
from lorasmith.workflow.node import NODES, Node
from lorasmith.workflow.sockets import ANY, MATCH, Input, types_match

MOST_NODES, _LISTED, _NAMED = 50_000, 50, 10
Prompt: TypeAlias = Mapping[str, Any]  # nodes by id, as in the file
_LONGEST_TITLE = 80
NOTES = ("Note", "MarkdownNote")  # classes
_SHOWN = 4


@dataclass(frozen=True)
class Link:
    """The source of an input: output number `output` of node `node_id`."""

    node_id: str
    output: int


@dataclass(frozen=True)
class GraphNode:
    """A node of a checked graph."""

    id: str  # key in the prompt
    title: str  # from the file, or the node's display name
    node: Node
    # checked links and typed values by the prompt's key, with declared defaults, without unknown inputs
    inputs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The node's name in messages."""
        return node_label(self.id, self.title)

    def links(self) -> Iterator[tuple[str, Link]]:
        """The linked inputs, in declared order."""
        for name in self.node.slots:
            if isinstance(link := self.inputs.get(name), Link):
                yield name, link


@dataclass(frozen=True)
class Graph:
    """A checked graph."""

    nodes: Mapping[str, GraphNode]  # those that outputs need, in order of execution
    outputs: tuple[str, ...]  # ids of the output nodes
    prompt: Prompt
    warnings: tuple[str, ...] = ()  # the first ignored faults, one sentence each, and the number of the others


@dataclass(frozen=True)
class GraphFault:
    """One fault of a prompt."""

    kind: str  # as in a ComfyUI server's response (`required_input_missing`, ...)
    label: str  # name of the node in messages; empty for the graph itself
    sentence: str  # rule, value and remedy
    node_id: str | None = None
    input_name: str | None = None

    def __str__(self) -> str:
        return f"{self.label}: {self.sentence}" if self.label else self.sentence


@dataclass(frozen=True)
class Examination:
    """The result of checking a prompt. `graph` can be run only if there are no faults."""

    graph: Graph
    faults: tuple[GraphFault, ...]


def validate(
    prompt: Prompt, folders: Folders, *, nodes: Registry[Node] = NODES, targets: Collection[str] | None = None
) -> Graph:
    """The graph of a prompt, arguments as for `examine`. Raises GraphError that lists all faults."""
    examination = examine(prompt, folders, nodes=nodes, targets=targets)
    if examination.faults:
        count = count_text(len(examination.faults), "fault")
        raise GraphError(f"this workflow cannot run, it has {count}", tuple(map(str, examination.faults)))
    return examination.graph


def examine(
    prompt: Prompt, folders: Folders, *, nodes: Registry[Node] = NODES, targets: Collection[str] | None = None
) -> Examination:
    """Check a whole prompt for the output nodes `targets`, all by default; `folders` have the choices of file inputs.

    GraphError if the prompt has more nodes than any workflow.
    """
    members = {str(key): member for key, member in prompt.items() if not is_remark(str(key), member)}
    if len(members) > MOST_NODES:
        raise GraphError(f"a workflow must have at most {MOST_NODES:,} nodes, got {len(members):,}; cut it")
    checker = _Checker(members, folders, nodes)
    drafts = checker.read_nodes()
    for draft in drafts.values():
        checker.check_links(draft, drafts)
    outputs = tuple(
        key for key, draft in drafts.items() if draft.node.output_node and (targets is None or key in targets)
    )
    unknown = tuple(key for key in checker.unknown if targets is None or key in targets)
    if not outputs and not unknown:
        known = ", ".join(name for name, node in nodes.items() if node.output_node) or "none is known"
        checker.find(None, "prompt_no_outputs", f"a workflow needs an output node ({known}), got none; add one")
    needs = {key: [link.node_id for _, link in draft.links()] for key, draft in drafts.items()}
    order, _ = depth_first(outputs, needs)
    for cycle in depth_first(drafts, needs)[1]:
        checker.find_cycle(cycle, drafts)
    # Without an output of a known class those of unknown classes may be outputs.
    needs |= {key: _linked_ids(checker.prompt[key]) for key in checker.unknown}
    goals = (*outputs, *(unknown if targets is not None else ())) or unknown or tuple(drafts)
    faults, ignored = checker.sorted_faults(set(depth_first(goals, needs)[0]))
    graph = Graph({key: drafts[key] for key in order}, outputs, prompt, _notes(ignored))
    return Examination(graph, faults)


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


class Cycle(NamedTuple):
    """Nodes of which each needs the next one, and the last the first; the middle of a long cycle is left out."""

    start: tuple[str, ...]  # its first nodes
    left_out: int = 0
    end: tuple[str, ...] = ()  # its last nodes, empty in short cycles


def depth_first(goals: Iterable[str], needs: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[Cycle, ...]]:
    """Dependencies of `goals`, goals included, once each in order of execution; and cycles. Takes linear time.

    The branch of one goal is completed before the next, in the order of `goals` and `needs`, which has the direct
    dependencies of each node; those without an entry of their own are ignored. Iterative, as workflows may be deeper
    than Python's recursion limit.
    """
    order: dict[str, None] = {}
    cycles: list[Cycle] = []
    for goal in goals:
        stack = [] if goal in order else [(goal, iter(needs[goal]))]
        path = {goal: 0} if stack else {}  # the nodes on the stack, with their places on it
        while stack:
            current, remaining = stack[-1]
            following = next(remaining, None)
            if following is None:
                stack.pop()
                del path[current]
                order[current] = None
            elif following in path:
                first, length = path[following], len(stack) - path[following]
                # Not the whole path: thousands of nodes may each lead back to the same one.
                start = tuple(node for node, _ in stack[first : first + _SHOWN])
                end = tuple(node for node, _ in stack[max(first + _SHOWN, len(stack) - _SHOWN) :])
                cycles.append(Cycle(start, length - len(start) - len(end), end))
            elif following not in order and following in needs:
                path[following] = len(stack)
                stack.append((following, iter(needs[following])))
    return tuple(order), tuple(cycles)


@dataclass
class _Checker:
    """Collects the faults of one prompt.

    Of very many, only each node's first one, without suggestions, as comparing names is slow.
    """

    prompt: Prompt
    folders: Folders
    nodes: Registry[Node]
    faults: list[GraphFault] = field(default_factory=list)
    warnings: list[GraphFault] = field(default_factory=list)
    unknown: dict[str, None] = field(default_factory=dict)
    faulty: set[str | None] = field(default_factory=set)
    types: dict[Link, str] = field(default_factory=dict)

    def find(self, node_id: str | None, kind: str, sentence: str, name: str | None = None) -> None:
        if self.is_crowded and node_id in self.faulty:
            return
        self.faulty.add(node_id)
        self.faults.append(GraphFault(kind, self._label(node_id), shortened(sentence), node_id, name))

    def warn(self, node_id: str, kind: str, sentence: str, name: str) -> None:
        self.warnings.append(GraphFault(kind, self._label(node_id), shortened(sentence), node_id, name))

    @property
    def is_crowded(self) -> bool:
        """Whether more was found than is listed."""
        return len(self.faults) + len(self.warnings) > 2 * _LISTED

    def _label(self, node_id: str | None) -> str:
        return "" if node_id is None else node_label(node_id, node_title(self.prompt.get(node_id), self.nodes))

    def _hint(self, name: str, known: Iterable[str]) -> str:
        return "" if self.is_crowded else nearest(name, known)

    def read_nodes(self) -> dict[str, GraphNode]:
        """All nodes of known classes, with checked values and unchecked links."""
        drafts = {}
        for key, member in self.prompt.items():
            node = self._class_of(key, member)
            if node is not None:
                inputs = self._read_inputs(key, node, member.get("inputs", {}))
                drafts[key] = GraphNode(key, node_title(member, self.nodes), node, inputs)
        return drafts

    def check_links(self, draft: GraphNode, drafts: Mapping[str, GraphNode]) -> None:
        """Check that each link comes from an existing output of a matching type."""
        matched: tuple[str, str] | None = None
        for name, link in draft.links():
            source = drafts.get(link.node_id)
            if source is None:
                continue  # of an unknown class, which is reported already
            count = len(source.node.outputs)
            if not 0 <= link.output < count:
                there = f"which has {count or 'no'} output{'' if count == 1 else 's'}, counted from 0"
                sentence = f"{name} is linked to output {link.output} of {source.label}, {there}; link another one"
                self.find(draft.id, "bad_linked_input", sentence, name)
                continue
            received, wanted = self._output_type(link, drafts), draft.node.slots[name].type
            output = f"output {source.node.outputs[link.output].label!r} of {source.label}"
            if not types_match(received, wanted):
                self.find(
                    draft.id,
                    "return_type_mismatch",
                    f"{name} must be linked to an output of type {wanted}, got the {received} {output}",
                    name,
                )
            elif wanted == MATCH and received != ANY:
                first, expected = matched or (name, received)
                matched = first, expected
                if not types_match(received, expected):
                    self.find(
                        draft.id,
                        "return_type_mismatch",
                        f"{name} must have the type of {first}, which is {expected}, got the {received} {output}",
                        name,
                    )

    def _output_type(self, link: Link, drafts: Mapping[str, GraphNode]) -> str:
        """The type of a link; for a MATCH output, the type that the node's inputs receive.

        Memoized, as a chain of such nodes would otherwise be followed from each of them.
        """
        followed: dict[Link, None] = {}
        type_ = ANY
        while link not in followed:
            if (known := self.types.get(link)) is not None:
                type_ = known
                break
            followed[link] = None
            source = drafts.get(link.node_id)
            if source is None or not 0 <= link.output < len(source.node.outputs):
                break
            if (declared := source.node.outputs[link.output].type) != MATCH:
                type_ = declared
                break
            onward = (source_link for name, source_link in source.links() if source.node.slots[name].type == MATCH)
            if (following := next(onward, None)) is None:
                break
            link = following
        self.types.update(dict.fromkeys(followed, type_))
        return type_

    def find_cycle(self, cycle: Cycle, drafts: Mapping[str, GraphNode]) -> None:
        start, end = ([drafts[key].label for key in keys] for keys in (cycle.start, (*cycle.end, cycle.start[0])))
        path = " → ".join((*start, *([f"{cycle.left_out:,} more"] if cycle.left_out else ()), *end))
        sentence = f"a node must not depend on its own output, but these do: {path}; remove one of the links"
        self.find(cycle.start[0], "dependency_cycle", sentence)

    def sorted_faults(self, needed: Collection[str]) -> tuple[tuple[GraphFault, ...], tuple[GraphFault, ...]]:
        """Faults that stop the run, and warnings, including faults of nodes that would not run."""
        places = {key: place for place, key in enumerate(self.prompt)}

        def place(fault: GraphFault) -> int:
            return places.get(fault.node_id or "", -1)

        faults: list[GraphFault] = []
        ignored = [*self.warnings]
        for one in self.faults:
            (faults if one.node_id is None or one.node_id in needed else ignored).append(one)
        return tuple(sorted(faults, key=place)), tuple(sorted(ignored, key=place))

    def _class_of(self, key: str, member: Any) -> Node | None:
        class_type = member.get("class_type") if isinstance(member, dict) else None
        if not isinstance(class_type, str) or not isinstance(member.get("inputs", {}), dict):
            sentence = "a node must be an object with class_type and inputs; export the workflow again"
        elif (node := class_of(member, self.nodes)) is not None:
            return node
        else:
            same = next((node for _, node in self.nodes.items() if class_type in node.search_aliases), None)
            remedy = "replace or remove it" if same is None else f"replace it by {same.id} ({same.display_name})"
            hint = self._hint(class_type, self.nodes) if same is None else ""
            sentence = f"unknown node {class_type!r}{hint}; {remedy}"
        self.unknown[key] = None
        self.find(key, "missing_node_type", sentence)
        return None

    def _read_inputs(self, key: str, node: Node, inputs_given: Mapping[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        assumed = {}
        for name, slot in node.slots.items():
            if name in inputs_given:
                self._read_input(key, slot, inputs_given[name], inputs)
            elif slot.default is not None:
                inputs[name] = slot.default
                if not (slot.optional or slot.may_lack):
                    assumed[name] = slot.default
            elif not (slot.optional or slot.may_lack):
                self.find(key, "required_input_missing", f"required input {name} is missing; add it", name)
        if assumed and not self.is_crowded:
            values = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
            self.warn(
                key, "required_input_missing", f"missing inputs take their defaults: {values}", next(iter(assumed))
            )
        for name in inputs_given:
            if name not in node.slots and not name.startswith("_") and not self.is_crowded:
                sentence = f"input {name} is ignored, as the node has no such input{self._hint(name, node.slots)}"
                self.warn(key, "unknown_input", sentence, name)
        return inputs

    def _read_input(self, key: str, slot: Input, value: Any, inputs: dict[str, Any]) -> None:
        """Add the checked value or link to `inputs`, or its fault."""
        if isinstance(value, list) and len(value) == 2 and _is_id(value[0]) and type(value[1]) is int:
            if (link := self._read_link(key, slot.name, value)) is not None:
                inputs[slot.name] = link
            return
        # A list that is a value although it looks like a link is wrapped.
        plain = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
        try:
            inputs[slot.name] = slot.check(plain, self.folders)
        except LorasmithError as error:
            if isinstance(value, list):
                sentence = f"{slot.name} must be a value or a link [node id, output number], got {value!r}"
                self.find(key, "bad_linked_input", sentence, slot.name)
            else:
                self.find(key, _value_fault(slot, plain), str(error), slot.name)

    def _read_link(self, key: str, name: str, value: list[Any]) -> Link | None:
        source, index = str(value[0]), value[1]
        if source not in self.prompt:
            sentence = (
                f"{name} is linked to node {source!r}, which is missing{self._hint(source, self.prompt)}; "
                "link another one"
            )
            self.find(key, "bad_linked_input", sentence, name)
            return None
        return Link(source, index)


def _notes(faults: Sequence[GraphFault]) -> tuple[str, ...]:
    """The first faults as text, those of unknown nodes in one, and the number of the others."""
    unknown = [fault.label for fault in faults if fault.kind == "missing_node_type"]
    others = [fault for fault in faults if fault.kind != "missing_node_type"]
    listed = tuple(shortened(other) for other in others[:_LISTED])
    more = len(others) - len(listed)
    if unknown:
        names = ", ".join(unknown[:_NAMED]) + (f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else "")
        listed = (shortened(f"left out, as their classes are unknown and no output needs them: {names}"), *listed)
    return (*listed, f"{more:,} more faults are not listed") if more else listed


def _linked_ids(member: Any) -> list[str]:
    """Ids of the nodes that a node of an unknown class appears to be linked to."""
    inputs = member.get("inputs") if isinstance(member, dict) else None
    values = inputs.values() if isinstance(inputs, dict) else ()
    return [str(value[0]) for value in values if isinstance(value, list) and len(value) == 2 and _is_id(value[0])]


def _value_fault(slot: Input, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if slot.min is not None and value < slot.min:
            return "value_smaller_than_min"
        if slot.max is not None and value > slot.max:
            return "value_bigger_than_max"
    return "value_not_in_list" if isinstance(value, str) and "COMBO" in slot.scalar_types else "invalid_input_type"


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _addressed(prompt: Prompt, address: str, override: str, nodes: Registry[Node]) -> tuple[str, str]:
    """Id of the node and name of the input in an address; titles and inputs may contain dots."""
    parts = [(address[:place], address[place + 1 :]) for place, letter in enumerate(address) if letter == "."]
    parts = [(node, name) for node, name in parts if node and name]
    for node, name in parts:
        if node in prompt:
            return node, name
    titles = {key: node_title(member, nodes) for key, member in prompt.items()}
    classes = {key: member.get("class_type") for key, member in prompt.items() if isinstance(member, dict)}
    for named in (titles, classes):
        for node, name in reversed(parts):
            keys = [key for key, place in named.items() if place == node]
            if len(keys) > 1:
                shown = ", ".join(printable(key, limit=_LONGEST_TITLE) for key in keys[:_LISTED])
                raise GraphError(f"override {override!r}: {len(keys)} nodes are called {node!r}; use an id: {shown}")
            if keys:
                return keys[0], name
    wanted = parts[0][0] if parts else address
    known = ", ".join(node_label(key, titles[key]) for key in [*prompt][:_LISTED])
    more = f" and {len(prompt) - _LISTED:,} more" if len(prompt) > _LISTED else ""
    hint = nearest(wanted, {*prompt, *titles.values()} - {""})
    raise GraphError(f"override {override!r}: no node {wanted!r}{hint}; there are {known or 'none'}{more}")


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
