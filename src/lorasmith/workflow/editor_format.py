"""Workflows in text, in API format or the editor's, alone or in metadata; and from the editor's format to a prompt.

This does what ComfyUI's editor does to queue a graph: values of widgets get their names, links are followed through
reroutes, bypassed nodes and the boundaries of subgraphs, subgraphs are replaced by their nodes (with ids `<id of the
instance>:<id in the subgraph>`), and muted and bypassed nodes, notes and primitive nodes are left out. A bypassed node
passes on the input with the output's number if its type fits, else the first of that type. Values that are lists are
wrapped as `{"__value__": [...]}`.

Three things differ from the editor (1.58): a muted or bypassed instance inside a subgraph does not run, as elsewhere;
ids in subgraphs stay those of the file, while the editor renames nodes whose id also occurs outside; and values missing
from a file are left out of the prompt, whose checks know the defaults. As in the editor, a primitive node sets the
widgets that are linked to it directly, not those behind a reroute or inside a subgraph. Files without the editor's own
widgets after seeds, values by name, and values of unknown nodes are read too, as far as their names are known.

The value of a subgraph's instance takes precedence over the inner node's: an inner input that is linked to an input of
its subgraph gets what that is linked to outside; without such a link, the instance's value of that input; the inner
node's own value is used only for an input that the instance does not set. Files have an instance's values in one of two
forms. Newer ones list one value for each input that represents a widget, in the order of the definition's inputs. Older
ones list them in the order of the property `proxyWidgets`, of which each entry names an inner node and a widget of it,
whether or not an input of the subgraph leads there; the editor first reads the list as if it were of the newer form,
then sets what `proxyWidgets` names.

Files are untrusted: numbers of nodes, depth of subgraphs, work and text are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorasmith.core.errors import GraphError
from lorasmith.core.files import MAX_TEXT_BYTES
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.core.registry import Registry
from lorasmith.workflow.editor_graph import (
    BYPASSED,
    MUTED,
    SAVE_AGAIN,
    EditorGraph,
    EditorInput,
    EditorNode,
    WidgetNames,
    is_editor_format,
    named_values,
    names_in,
    read_editor_graph,
)
from lorasmith.workflow.graph import MOST_NODES, NOTES, depth_first
from lorasmith.workflow.node import NODES, Node
from lorasmith.workflow.sockets import ANY


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
    workflow = parse_workflow(prompt, nodes=nodes)
    try:
        kept = None if editor is None else parse_foreign_json(editor)
    except ValueError:
        kept = None  # only written into the files of this run
    return Workflow(workflow.prompt, workflow.editor or (kept if is_editor_format(kept) else None))


def _kind(content: object) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number or null")


_EXPORT = "in ComfyUI choose Workflow > Save or Workflow > Export (API) and use that file"


def prompt_of_editor(
    content: Mapping[str, Any], *, nodes: Registry[Node] = NODES, names: WidgetNames | None = None
) -> dict[str, Any]:
    """The prompt of a graph in the editor's format; `names` of each class's widgets are by default those of `nodes`.

    Values of unknown classes that cannot be named are left out; `examine` reports the nodes. GraphError if nodes are
    malformed or share an id, a subgraph contains itself, or the graph is larger than any workflow.
    """
    return _Conversion(read_editor_graph(content), names or names_in(nodes)).prompt()


@dataclass
class HostValues:
    """Values that an instance sets."""

    inputs: dict[str, Any] = field(default_factory=dict)  # by input of the subgraph
    # by id of an inner node and widget, where no input of the subgraph leads to the widget; of an inner instance by the
    # name of its input, of a primitive node by an empty one
    inner: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Scope:
    """A graph at one place: the file's, or a subgraph for one of its instances."""

    graph: EditorGraph
    path: str = ""  # prefix of its ids
    parent: _Scope | None = None  # of the instance; None for the file's graph
    host: EditorNode | None = None  # the instance in `parent`
    set: HostValues = field(default_factory=HostValues)  # by the instance


class _Input(NamedTuple):
    """A step along a link: an input of a node, on the way to an input of type `type`."""

    scope: _Scope
    node: EditorNode
    number: int
    type: str


class _Output(NamedTuple):
    """A step along a link: an output of a node."""

    scope: _Scope
    node_id: str
    number: int
    type: str


class _Found(NamedTuple):
    """The end of a link: a link or a value of a prompt; `is_there` is False for neither."""

    value: Any = None
    is_there: bool = True


class _Conversion:
    def __init__(self, graph: EditorGraph, names: WidgetNames) -> None:
        _check_nesting(graph)
        self._names = names
        self._hosts = Hosts(names)
        self._root = _Scope(graph)
        self._scopes: dict[tuple[_Scope, str], _Scope] = {}
        self._ends: dict[_Input | _Output, _Found] = {}
        self._work = 0

    def prompt(self) -> dict[str, Any]:
        prompt: dict[str, Any] = {}
        for scope, node in self._running():
            if (key := scope.path + node.id) in prompt:  # such as a node 5:3 beside an instance 5 with a node 3
                raise GraphError(f"ids of nodes must be unique, but two nodes are {_shown(key)}; {SAVE_AGAIN}")
            entry = {"class_type": node.type, "inputs": self._inputs(scope, node)}
            prompt[key] = {**entry, "_meta": {"title": node.title}} if node.title else entry
        return prompt

    def _running(self) -> Iterator[tuple[_Scope, EditorNode]]:
        """The nodes that run, those of a subgraph in place of its instance."""
        count, weight = 0, 0
        stack = [(self._root, iter(self._root.graph.nodes.values()))]
        while stack:
            scope, remaining = stack[-1]
            if (node := next(remaining, None)) is None:
                stack.pop()
                continue
            count, weight = count + 1, weight + node.weight + len(scope.path)
            if count > MOST_NODES or weight > MAX_TEXT_BYTES:
                raise GraphError(
                    f"a workflow must have at most {MOST_NODES:,} nodes and {MAX_TEXT_BYTES:,} characters with its "
                    "subgraphs in place, but this one has more; cut it"
                )
            if not node.is_active:
                continue
            if scope.graph.definition_of(node) is not None:
                inner = self._within(scope, node)
                stack.append((inner, iter(inner.graph.nodes.values())))
            elif node.type not in _NOT_RUN:
                yield scope, node

    def _within(self, scope: _Scope, node: EditorNode) -> _Scope:
        """The scope of an instance in `scope`."""
        key = (scope, node.id)
        if (known_scope := self._scopes.get(key)) is not None:
            return known_scope
        graph, values = scope.graph.definitions[node.type], self._hosts.values(node, scope.graph)
        made = self._scopes[key] = _Scope(graph, f"{scope.path}{node.id}:", scope, node, values)
        return made

    def _inputs(self, scope: _Scope, node: EditorNode) -> dict[str, Any]:
        inputs = {name: _wrapped(value) for name, value in (self._hosts.named(node) or {}).items()}
        outside = scope.set.inner.get(node.id, {})
        inputs |= {name: _wrapped(value) for name, value in outside.items()}
        for number, socket in enumerate(node.inputs):
            if not socket.name or socket.link is None or (socket.widget or socket.name) in outside:
                continue
            end = self._held(scope, node, number) or self._end(_Input(scope, node, number, socket.type))
            if end.is_there:
                inputs[socket.name] = end.value
        return inputs

    def _held(self, scope: _Scope, node: EditorNode, number: int) -> _Found | None:
        """The value of the primitive node that an input is directly linked to, if any.

        The editor writes it into the widget in the input's place; links to it through other nodes have no effect.
        """
        socket = node.inputs[number]
        link = scope.graph.links.get(socket.link or "")
        source = scope.graph.nodes.get(link.origin) if link is not None else None
        if source is None or source.type != PRIMITIVE or (socket.widget or socket.name) not in self._widgets(node):
            return None
        value = scope.set.inner.get(source.id, {}).get("", _first(source.values))
        return None if value is None else _Found(_wrapped(value))

    def _widgets(self, node: EditorNode) -> Collection[str | None]:
        """Names of a node's widgets, or of the sockets in their places if its class is unknown."""
        known = self._names(node.type, node.values if isinstance(node.values, list) else [])
        return known if known is not None else [socket.widget for socket in node.inputs if socket.widget is not None]

    def _end(self, place: _Input | _Output) -> _Found:
        """The end of the link from `place`; each place is visited once."""
        way: dict[_Input | _Output, None] = {}
        following: _Input | _Output | _Found = place
        while not isinstance(following, _Found):
            if (end := self._ends.get(following)) is not None:
                following = end
            elif following in way:
                following = _NOTHING  # a circle of reroutes
            else:
                way[following] = None
                self._spend(1)
                following = self._before(following) if isinstance(following, _Input) else self._through(following)
        self._ends.update(dict.fromkeys(way, following))
        return following

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > _MOST_WORK:
            raise GraphError("links of a workflow must lead through two million nodes at most, got more; cut it")

    def _before(self, place: _Input) -> _Input | _Output | _Found:
        """The place, or value, that an input is linked to."""
        scope, node, number, kind = place
        key = node.inputs[number].link
        link = scope.graph.links.get(key) if key is not None else None
        if link is None:
            return _NOTHING
        if link.origin != scope.graph.source:
            return _Output(scope, link.origin, link.origin_slot, kind)
        return self._outside(scope, link.origin_slot)

    def _outside(self, scope: _Scope, number: int) -> _Input | _Found:
        """Out of a subgraph through one of its inputs."""
        if scope.parent is None or scope.host is None or number >= len(scope.graph.inputs):
            return _NOTHING
        name = scope.graph.inputs[number].name
        socket = scope.host.by_name.get(name)
        linked = socket is not None and scope.host.inputs[socket].link in scope.parent.graph.links
        outside = scope.parent.set.inner.get(scope.host.id, {})
        if socket is not None and linked and name not in outside:
            return _Input(scope.parent, scope.host, socket, scope.host.inputs[socket].type)
        value = outside.get(name, scope.set.inputs.get(name))
        return _NOTHING if value is None else _Found(_wrapped(value))

    def _through(self, place: _Output) -> _Input | _Output | _Found:
        """The place that an output passes on; the link to it, if its node runs."""
        scope, node_id, number, kind = place
        node = scope.graph.nodes.get(node_id)
        if node is None or node.mode == MUTED:
            return _NOTHING
        if node.mode == BYPASSED:
            self._spend(len(node.inputs))
            passed = _passed_on(node, number, kind)
            return _NOTHING if passed is None else _Input(scope, node, passed, node.inputs[passed].type)
        if node.type == _REROUTE:
            return _Input(scope, node, 0, kind) if node.inputs else _NOTHING
        if scope.graph.definition_of(node) is not None:
            return self._inside(self._within(scope, node), number, kind)
        return _NOTHING if node.type in _NOT_RUN else _Found([scope.path + node_id, number])

    def _inside(self, scope: _Scope, number: int, kind: str) -> _Input | _Output | _Found:
        """Into a subgraph through one of its outputs."""
        if number >= len(scope.graph.outputs):
            return _NOTHING
        for key in scope.graph.outputs[number].links:
            if (link := scope.graph.links.get(key)) is None:
                continue
            if link.origin == scope.graph.source:
                return self._outside(scope, link.origin_slot)
            return _Output(scope, link.origin, link.origin_slot, kind)
        return _NOTHING


def _check_nesting(graph: EditorGraph) -> None:
    """Refuse subgraphs that contain themselves or are nested too deep, before anything is computed of them."""
    needs = {
        key: [node.type for node in definition.nodes.values() if node.type in graph.definitions]
        for key, definition in (*graph.definitions.items(), ("", graph))
    }
    order, cycles = depth_first([""], needs)
    for cycle in cycles:
        name = _shown(graph.definitions[cycle.start[0]].name)
        raise GraphError(f"a subgraph must not contain itself, but {name} does; remove one of the two")
    depths: dict[str, int] = {}
    for key in order:
        depths[key] = 1 + max((depths[inner] for inner in needs[key]), default=-1)
    if depths[""] > _DEEPEST:
        raise GraphError(f"subgraphs must be at most {_DEEPEST} deep in one another, got {depths['']}; unpack some")


def _passed_on(node: EditorNode, output: int, wanted: str) -> int | None:
    """Number of the input that a bypassed node passes on for an output, to an input of type `wanted`."""
    inputs = node.inputs
    if wanted == ANY:
        return output if output < len(inputs) else 0 if inputs else None
    produced = node.outputs[output] if output < len(node.outputs) else ANY
    fitting = [
        place for place, socket in enumerate(inputs) if _fits(socket.type, produced) and _fits(socket.type, wanted)
    ]
    if output in fitting:
        return output
    exact = [place for place, socket in enumerate(inputs) if socket.type == wanted]
    return next(iter(exact or fitting), None)


def _fits(type_: str, other: str) -> bool:
    """Whether the editor links sockets of these types."""
    if type_ == other or ANY in (type_, other):
        return True
    if "," not in type_ and "," not in other:
        return type_.lower() == other.lower()
    return not {*type_.lower().split(",")}.isdisjoint(other.lower().split(","))


def _wrapped(value: Any) -> Any:
    return {"__value__": value} if isinstance(value, list) else value


def _first(values: Any) -> Any:
    if isinstance(values, dict):
        values = [*values.values()]
    return values[0] if values else None


def _shown(name: str) -> str:
    return repr(printable(name, limit=80))


class _Source(NamedTuple):
    """The widget inside a subgraph that an input represents: of a node, or the input of an inner instance."""

    node_id: str
    widget: str


@dataclass
class _Sources:
    """The widgets of a subgraph's inputs: by input, and the first input by source and by name of the widget."""

    of: dict[str, _Source | None] = field(default_factory=dict)
    inputs: dict[_Source, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: _Source | None) -> None:
        if name in self.of:
            return
        self.of[name] = source
        if source is not None:
            self.inputs.setdefault(source, name)
            self.named.setdefault(name, name)
            self.named.setdefault(source.widget, name)


class Hosts:
    """The values of all instances of a file, each computed once; `names` are those of each class's widgets."""

    def __init__(self, names: WidgetNames) -> None:
        self._names = names
        self._values: dict[EditorNode, HostValues] = {}
        self._sources: dict[EditorGraph, _Sources] = {}
        self._named: dict[EditorNode, dict[str, Any] | None] = {}

    def values(self, host: EditorNode, graph: EditorGraph) -> HostValues:
        """What `host`, an instance in `graph`, sets inside its subgraph, which must not contain itself."""
        if host not in self._values:
            self._values[host] = self._read(host, graph)
        return self._values[host]

    def named(self, node: EditorNode) -> dict[str, Any] | None:
        """Values of a node's widgets by name; None if their names are unknown."""
        if node not in self._named:
            self._named[node] = named_values(node, self._names)
        return self._named[node]

    def _read(self, host: EditorNode, graph: EditorGraph) -> HostValues:
        subgraph = graph.definitions[host.type]
        widgets = {name: source for name, source in self._sources_of(subgraph).of.items() if source is not None}
        values = HostValues()
        for name, source in widgets.items():
            if (initial := self._initial(source, subgraph)) is not None:
                values.inputs[name] = initial
        by_position = host.values if isinstance(host.values, list) else []
        by_name = host.values if isinstance(host.values, dict) else host.named if host.values is None else {}
        written = {**dict(zip(widgets, by_position, strict=False)), **by_name, **host.set_aside}
        values.inputs |= {name: written[name] for name in widgets if written.get(name) is not None}
        for proxy, value in zip(host.proxies, by_position, strict=False):
            if value is not None:
                self._set(values, subgraph, proxy, value)
        return values

    def _set(self, values: HostValues, subgraph: EditorGraph, proxy: tuple[str, str, str], value: Any) -> None:
        """Set the value of an entry of `proxyWidgets`."""
        node_id, widget, within = proxy
        node = subgraph.nodes.get(node_id)
        if node_id == "-1":
            values.inputs[widget] = value
        elif node is not None and not widget.startswith("$$"):  # those are previews
            name = self._widget_of(subgraph, node, widget, within)
            outer = self._sources_of(subgraph).inputs.get(_Source(node_id, name or ""))
            if outer is not None:
                values.inputs[outer] = value
            elif name is not None:
                values.inner.setdefault(node_id, {})[name] = value

    def _widget_of(self, subgraph: EditorGraph, node: EditorNode, widget: str, within: str) -> str | None:
        """The key of an entry's value in `HostValues.inner`."""
        if node.type == PRIMITIVE:
            return ""
        short = _without_prefixes(widget, within)
        if (inner := subgraph.definition_of(node)) is None:
            return widget if widget in (self.named(node) or {}) else short[0]
        sources = self._sources_of(inner)
        for name, key in ((widget, within), short):
            known = sources.inputs.get(_Source(key, name)) if key else sources.named.get(name)
            if known is not None:
                return known
        return None

    def _initial(self, source: _Source, graph: EditorGraph) -> Any:
        node = graph.nodes[source.node_id]
        if graph.definition_of(node) is None:
            return (self.named(node) or {}).get(source.widget)
        return self.values(node, graph).inputs.get(source.widget)

    def _sources_of(self, subgraph: EditorGraph) -> _Sources:
        if subgraph not in self._sources:
            sources = self._sources[subgraph] = _Sources()
            for boundary in subgraph.inputs:
                sources.add(boundary.name, self._source(subgraph, boundary.links))
        return self._sources[subgraph]

    def _source(self, subgraph: EditorGraph, links: tuple[str, ...]) -> _Source | None:
        """The widget of an input, by the first of its links that leads to one; None for a socket only."""
        for key in links:
            link = subgraph.links.get(key)
            node = subgraph.nodes.get(link.target) if link is not None else None
            if node is None or key not in node.by_link:
                continue
            socket = node.inputs[node.by_link[key]]
            if (inner := subgraph.definition_of(node)) is not None:
                if self._sources_of(inner).of.get(socket.name) is not None:
                    return _Source(node.id, socket.name)
            elif (widget := self._widget(node, socket)) is not None:
                return _Source(node.id, widget)
        return None

    def _widget(self, node: EditorNode, socket: EditorInput) -> str | None:
        """The widget in the place of a socket. What a file says of it counts only for nodes of unknown classes."""
        known = self._names(node.type, node.values if isinstance(node.values, list) else [])
        if known is None:
            return socket.widget
        return next((name for name in (socket.widget, socket.name) if name is not None and name in known), None)


def _without_prefixes(widget: str, within: str) -> tuple[str, str]:
    """A widget's name without the ids of inner nodes before it, as in `4: 7: text`, and the last of these ids."""
    match = _PREFIXES.fullmatch(widget)
    return (match[2], match[1]) if match else (widget, within)


_PREFIXES = re.compile(r"(?:\s*+(\d++)\s*+:(?=.))++\s*(.+)", re.DOTALL)


PRIMITIVE = "PrimitiveNode"  # the editor's class of nodes with the value of other nodes' widgets
_NOTHING = _Found(is_there=False)
_REROUTE = "Reroute"
_NOT_RUN = frozenset((*NOTES, PRIMITIVE, _REROUTE))
_DEEPEST, _MOST_WORK = 50, 2_000_000
