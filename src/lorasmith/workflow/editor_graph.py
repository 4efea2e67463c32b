"""Graphs in the format of ComfyUI's editor: nodes, links and subgraphs of a workflow file, and the names of values.

The editor writes links as lists (version 0.4) or as objects (version 1, and in every subgraph), values of widgets by
position or by name, and inputs with the id of their link. Definitions of subgraphs are listed once in the file; a node
whose type is the id of a definition is an instance of it. `editor_format` converts these to a prompt.

Values are listed by position, without names, in the order of the node's declaration: required inputs, then optional
ones. Between them are values of widgets that the editor adds itself, of which the one after a seed (its change after
each run) matters for the count. Inputs that are sockets only have no widget, although older files keep a value for
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from lorasmith.core.errors import GraphError
from lorasmith.core.printable import printable
from lorasmith.core.registry import Registry
from lorasmith.workflow.node import NODES, Node
from lorasmith.workflow.sockets import SCALARS, Input

MUTED, BYPASSED = 2, 4  # modes of nodes that do not run; a bypassed one passes its inputs on
SAVE_AGAIN = "save the workflow again in ComfyUI"  # remedy for malformed files
_LONGEST, _LONGEST_NUMBER = 80, 9
WidgetNames: TypeAlias = Callable[[str, Sequence[Any]], "Sequence[str | None] | None"]
"""Names of a class's values by position, given the class and the values; None in place of a name for a value of the
editor's own, and None in place of the list for an unknown class."""

SEEDS = ("seed", "noise_seed")
"""Integers of these names have a control after them, unless their declaration says otherwise."""

_CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")


class EditorLink(NamedTuple):
    """A link from an output to an input, by ids of nodes and numbers of sockets."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


class EditorInput(NamedTuple):
    """An input socket; `link` is the id of a link or None, `widget` the name of the widget in its place or None."""

    name: str
    type: str
    link: str | None
    widget: str | None


class Boundary(NamedTuple):
    """An input or output of a whole subgraph; `links` are ids of links inside it."""

    name: str
    links: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EditorNode:
    """A node of an editor's graph."""

    id: str  # unique in its graph
    type: str  # class of the node, or id of a subgraph
    title: str = ""  # set by a user; empty for none
    mode: int = 0  # 0 for a node that runs, `MUTED` or `BYPASSED`
    inputs: tuple[EditorInput, ...] = ()
    outputs: tuple[str, ...] = ()  # types
    # of its widgets, by position or by name; None if the file has none
    values: list[Any] | dict[str, Any] | None = None
    # values by name beside those by position, which the editor then ignores
    named: Mapping[str, Any] = field(default_factory=dict)
    # of a subgraph's instance in older files, one per value: (id of the inner node, its widget, id of a node within it
    # or empty)
    proxies: tuple[tuple[str, str, str], ...] = ()
    # of a subgraph's instance: values by input that the editor could not place otherwise
    set_aside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        """Whether it is neither muted nor bypassed."""
        return self.mode not in (MUTED, BYPASSED)

    @cached_property
    def weight(self) -> int:
        """Approximate number of characters that the node adds to a prompt."""
        return len(self.id) + len(self.title) + len(json.dumps([self.values, self.named]))

    @cached_property
    def by_name(self) -> Mapping[str, int]:
        """Number of the first input of each name."""
        return {socket.name: number for number, socket in reversed([*enumerate(self.inputs)])}

    @cached_property
    def by_link(self) -> Mapping[str, int]:
        """Number of the first input of each link."""
        return {
            socket.link: number for number, socket in reversed([*enumerate(self.inputs)]) if socket.link is not None
        }


@dataclass(frozen=True, eq=False)
class EditorGraph:
    """A graph, or the definition of a subgraph."""

    nodes: Mapping[str, EditorNode]  # by id
    links: Mapping[str, EditorLink]  # by id
    name: str = ""  # of a subgraph
    inputs: tuple[Boundary, ...] = ()  # of a subgraph
    outputs: tuple[Boundary, ...] = ()  # of a subgraph
    source: str = ""  # id by which links name the subgraph's inputs
    sink: str = ""  # id by which links name the subgraph's outputs
    # subgraphs by id, the same for all graphs of a file
    definitions: Mapping[str, EditorGraph] = field(default_factory=dict)

    def definition_of(self, node: EditorNode) -> EditorGraph | None:
        """The subgraph that a node is an instance of, if any."""
        return self.definitions.get(node.type)

    def inner(self, key: str) -> EditorNode | None:
        """The node of an id as in a prompt: `12:5` is node 5 in the subgraph of node 12."""
        graph: EditorGraph | None = self
        node = None
        for id in key.split(":"):
            node = None if graph is None else graph.nodes.get(id)
            graph = None if graph is None or node is None else graph.definition_of(node)
        return node


def is_editor_format(content: object) -> bool:
    """Whether a file's JSON is in the editor's format."""
    return isinstance(content, dict) and isinstance(content.get("nodes"), list)


def read_editor_graph(content: Mapping[str, Any]) -> EditorGraph:
    """The graph in a file's JSON, without malformed links and sockets and links to nowhere.

    GraphError if a node or a subgraph is not an object with an id, or two have the same.
    """
    definitions: dict[str, EditorGraph] = {}
    for definition in _definitions(content):
        if (key := _key(definition.get("id"))) is None:
            raise GraphError(
                f"a subgraph of a workflow must have an id, got {_shown(definition.get('id'))}; {SAVE_AGAIN}"
            )
        if key not in definitions:
            definitions[key] = _graph(definition, definitions, subgraph=True)
    return _graph(content, definitions, subgraph=False)


def names_in(nodes: Registry[Node] = NODES) -> WidgetNames:
    """Names of the values of registered nodes."""

    def names(class_type: str, values: Sequence[Any]) -> Sequence[str | None] | None:
        if class_type not in nodes:
            return None
        inputs = [slot for slot in nodes[class_type].inputs if slot.grow is None and slot.type in SCALARS]
        inputs.sort(key=lambda slot: slot.optional)
        shown = [*_names(slot for slot in inputs if not slot.force_input)]
        every = [*_names(inputs)]
        if len(shown) < len(every) == len(values):
            forced = {slot.name for slot in inputs if slot.force_input}
            return [None if name in forced else name for name in every]
        return without_missing_controls(shown, values)

    return names


def named_values(node: EditorNode, names: WidgetNames) -> dict[str, Any] | None:
    """A node's widget values by name; None if it has values whose names are unknown.

    For an unknown class, names are those of its widget inputs, if there are as many as values.
    """
    if isinstance(node.values, dict):
        return dict(node.values)
    values = node.values or []
    shown_names = names(node.type, values)
    if shown_names is None:
        if not values or node.named:
            return dict(node.named)
        shown = [*_with_controls(socket.widget for socket in node.inputs if socket.widget is not None)]
        shown_names = without_missing_controls(shown, values)
        if len(shown_names) != len(values):
            return None
    if node.values is None:
        return {name: node.named[name] for name in shown_names if name is not None and name in node.named}
    return {name: value for name, value in zip(shown_names, values, strict=False) if name is not None}


def is_control(value: object) -> bool:
    """Whether a value is that of a widget that changes a seed after each run; early files have a boolean."""
    return value is None or isinstance(value, bool) or value in _CONTROLS


def without_missing_controls(names: Sequence[str | None], values: Sequence[Any]) -> list[str | None]:
    """`names` without the controls (None) for which there are no `values`: only the editor writes them."""
    kept: list[str | None] = []
    for name in names:
        place = len(kept)
        if name is None and place < len(values) and not is_control(values[place]):
            continue
        kept.append(name)
    return kept


def _definitions(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Definitions in a file, including those inside other definitions."""
    pending = [content]
    while pending:
        inner = pending.pop().get("definitions")
        listed = inner.get("subgraphs") if isinstance(inner, dict) else None
        for definition in listed if isinstance(listed, list) else ():
            if not isinstance(definition, dict):
                raise GraphError(f"a subgraph of a workflow must be an object, got {_shown(definition)}; {SAVE_AGAIN}")
            yield definition
            pending.append(definition)


def _graph(content: Mapping[str, Any], definitions: Mapping[str, EditorGraph], *, subgraph: bool) -> EditorGraph:
    nodes: dict[str, EditorNode] = {}
    for item in _list(content, "nodes"):
        node = _node(item)
        if node.id in nodes:
            shown = printable(node.id, limit=_LONGEST)
            raise GraphError(f"ids of nodes must be unique, but two nodes have the id {shown}; {SAVE_AGAIN}")
        nodes[node.id] = node
    links = dict(filter(None, map(_link, _list(content, "links"))))
    if not subgraph:
        return EditorGraph(nodes, links, definitions=definitions)
    source = _key(_object(content.get("inputNode")).get("id")) or "-10"
    sink = _key(_object(content.get("outputNode")).get("id")) or "-20"
    begun: dict[tuple[str, int], list[str]] = {}
    ended: dict[tuple[str, int], list[str]] = {}
    for key, item in links.items():
        begun.setdefault((item.origin, item.origin_slot), []).append(key)
        ended.setdefault((item.target, item.target_slot), []).append(key)
    # An input leads to many sockets, in the order of its list; an output has one link, the first in the file.
    inputs = tuple(
        Boundary(_text(boundary.get("name")), _keys(boundary) or tuple(begun.get((source, place), ())))
        for place, boundary in enumerate(map(_object, _list(content, "inputs")))
    )
    outputs = tuple(
        Boundary(_text(boundary.get("name")), tuple(ended.get((sink, place), ())) or _keys(boundary))
        for place, boundary in enumerate(map(_object, _list(content, "outputs")))
    )
    return EditorGraph(nodes, links, _text(content.get("name")), inputs, outputs, source, sink, definitions)


def _node(content: Any) -> EditorNode:
    key, type_ = (_object(content).get(name) for name in ("id", "type"))
    if (key := _key(key)) is None or not isinstance(type_, str):
        raise GraphError(
            f"a node of a workflow must be an object with an id and a type, got {_shown(content)}; {SAVE_AGAIN}"
        )
    properties = _object(content.get("properties"))
    values, mode = content.get("widgets_values"), content.get("mode")
    return EditorNode(
        id=key,
        type=type_,
        title=_text(content.get("title")),
        mode=mode if isinstance(mode, int) else 0,
        inputs=tuple(_input(_object(socket)) for socket in _list(content, "inputs")),
        outputs=tuple(_type(_object(socket).get("type")) for socket in _list(content, "outputs")),
        values=values if isinstance(values, (list, dict)) else None,
        named=_object(content.get("widgets_values_named")),
        proxies=tuple(filter(None, map(_proxy, _list(properties, "proxyWidgets")))),
        set_aside=dict(filter(None, map(_set_aside, _list(properties, "proxyWidgetErrorQuarantine")))),
    )


def _input(content: Mapping[str, Any]) -> EditorInput:
    widget = _text(_object(content.get("widget")).get("name")) or None
    return EditorInput(_text(content.get("name")), _type(content.get("type")), _key(content.get("link")), widget)


def _link(content: Any) -> tuple[str, EditorLink] | None:
    if isinstance(content, dict):
        content = [content.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    if not isinstance(content, list) or len(content) < 5:
        return None
    key, origin, target = (_key(content[place]) for place in (0, 1, 3))
    origin_slot, target_slot = (_slot(content[place]) for place in (2, 4))
    if key is None or origin is None or target is None or origin_slot is None or target_slot is None:
        return None
    return key, EditorLink(origin, origin_slot, target, target_slot)


def _keys(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the links of a subgraph's input or output."""
    return tuple(key for key in map(_key, _list(content, "linkIds")) if key is not None)


def _proxy(content: Any) -> tuple[str, str, str] | None:
    if not isinstance(content, list) or len(content) < 2 or not _text(content[1]) or (key := _key(content[0])) is None:
        return None
    return key, content[1], (_key(content[2]) or "") if len(content) > 2 else ""


def _set_aside(content: Any) -> tuple[str, Any] | None:
    entry, value = _proxy(_object(content).get("originalEntry")), _object(content).get("hostValue")
    return None if entry is None or entry[0] != "-1" or value is None else (entry[1], value)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    value = content.get(name)
    return value if isinstance(value, list) else []


def _key(value: Any) -> str | None:
    """An id as text; None if it is not an id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) and value != "" else None


def _slot(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= _LONGEST_NUMBER:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _type(value: Any) -> str:
    return _text(value) or "*"


def _shown(value: Any) -> str:
    return printable(repr(value), limit=_LONGEST)


def _names(inputs: Sequence[Input] | Iterator[Input]) -> Iterator[str | None]:
    for slot in inputs:
        yield slot.name
        if slot.type == "INT" and slot.extras.get("control_after_generate", slot.name in SEEDS):
            yield None


def _with_controls(names: Iterator[str]) -> Iterator[str | None]:
    for name in names:
        yield name
        if name in SEEDS:
            yield None
