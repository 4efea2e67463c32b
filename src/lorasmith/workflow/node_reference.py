"""The node reference: nodes by category or name, and the facts of their inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lorasmith.core.errors import GraphError
from lorasmith.core.registry import Registry, nearest
from lorasmith.workflow.node import Node
from lorasmith.workflow.sockets import Input


def nodes_by_category(nodes: Registry[Node]) -> Iterator[tuple[str, list[Node]]]:
    """The nodes of each category, both in alphabetical order, without deprecated ones."""
    ordered = sorted(
        (node for _, node in nodes.items() if not node.deprecated), key=lambda node: (node.category, node.id.casefold())
    )
    for category, members in itertools.groupby(ordered, key=lambda node: node.category):
        yield category, [*members]


def find_node(name: str, nodes: Registry[Node]) -> Node:
    """The node of a class, alias or unique title, ignoring case. GraphError if there is none, or several."""
    if (name := name.strip()) in nodes:
        return nodes[name]
    titled = [node for _, node in nodes.items() if node.display_name.casefold() == name.casefold()]
    if len(titled) > 1:
        shown = ", ".join(node.id for node in titled)
        raise GraphError(f"{len(titled)} nodes are called {name!r}; give a class: {shown}")
    if not titled:
        hint = nearest(name, [*nodes, *(node.display_name for _, node in nodes.items())])
        raise GraphError(f"unknown node {name!r}{hint}; `lorasmith nodes` lists all")
    return titled[0]


def input_facts(one: Input, choices: Sequence[str] = ()) -> list[str]:
    """Type, default, range and choices (of a COMBO) of an input, a few words each."""
    facts = ["any type" if one.type == "*" else "choice" if one.type == "COMBO" else one.type]
    if one.grow is not None:
        facts.append(f"repeated {one.grow.min} to {len(one.grow.suffixes)} times")
    if one.default is not None:
        facts.append(f"default {one.default!r}")
    if one.min is not None or one.max is not None:
        bounds = (
            f"{word} {_number(bound)}" for word, bound in (("from", one.min), ("to", one.max)) if bound is not None
        )
        facts.append(" ".join(bounds))
    if choices:
        facts.append(f"one of {', '.join(choices)}")
    return facts


def badges(node: Node) -> list[str]:
    """Properties of a node as a whole, such as deprecated."""
    said = {"output": node.output_node, "experimental": node.experimental, "deprecated": node.deprecated}
    return [name for name, is_so in said.items() if is_so]


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
