"""Values that an instance of a subgraph sets on widgets inside it.

The instance's value takes precedence over the inner node's (by the rules of ComfyUI's editor 1.58): an inner input that
is linked to an input of its subgraph gets what that is linked to outside; without such a link, the instance's value of
that input; the inner node's own value is used only for an input that the instance does not set.

Files have an instance's values in one of two forms. Newer ones list one value for each input that represents a widget,
in the order of the definition's inputs. Older ones list them in the order of the property `proxyWidgets`, of which each
entry names an inner node and a widget of it, whether or not an input of the subgraph leads there; the editor first
reads the list as if it were of the newer form, then sets what `proxyWidgets` names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorasmith.workflow.editor_graph import EditorGraph, EditorInput, EditorNode
from lorasmith.workflow.editor_widgets import WidgetNames, named_values

PRIMITIVE = "PrimitiveNode"  # the editor's class of nodes with the value of other nodes' widgets


@dataclass
class HostValues:
    """Values that an instance sets."""

    inputs: dict[str, Any] = field(default_factory=dict)  # by input of the subgraph
    # by id of an inner node and widget, where no input of the subgraph leads to the widget; of an inner instance by the
    # name of its input, of a primitive node by an empty one
    inner: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        found = HostValues()
        for name, source in widgets.items():
            if (initial := self._initial(source, subgraph)) is not None:
                found.inputs[name] = initial
        by_position = host.values if isinstance(host.values, list) else []
        by_name = host.values if isinstance(host.values, dict) else host.named if host.values is None else {}
        given = {**dict(zip(widgets, by_position, strict=False)), **by_name, **host.set_aside}
        found.inputs |= {name: given[name] for name in widgets if given.get(name) is not None}
        for proxy, value in zip(host.proxies, by_position, strict=False):
            if value is not None:
                self._set(found, subgraph, proxy, value)
        return found

    def _set(self, found: HostValues, subgraph: EditorGraph, proxy: tuple[str, str, str], value: Any) -> None:
        """Set the value of an entry of `proxyWidgets`."""
        node_id, widget, within = proxy
        node = subgraph.nodes.get(node_id)
        if node_id == "-1":
            found.inputs[widget] = value
        elif node is not None and not widget.startswith("$$"):  # those are previews
            name = self._widget_of(subgraph, node, widget, within)
            outer = self._sources_of(subgraph).inputs.get(_Source(node_id, name or ""))
            if outer is not None:
                found.inputs[outer] = value
            elif name is not None:
                found.inner.setdefault(node_id, {})[name] = value

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
            found = self._sources[subgraph] = _Sources()
            for one in subgraph.inputs:
                found.add(one.name, self._source(subgraph, one.links))
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
        return next((one for one in (socket.widget, socket.name) if one is not None and one in known), None)


def _without_prefixes(widget: str, within: str) -> tuple[str, str]:
    """A widget's name without the ids of inner nodes before it, as in `4: 7: text`, and the last of these ids."""
    match = _PREFIXES.fullmatch(widget)
    return (match[2], match[1]) if match else (widget, within)


_PREFIXES = re.compile(r"(?:\s*+(\d++)\s*+:(?=.))++\s*(.+)", re.DOTALL)
