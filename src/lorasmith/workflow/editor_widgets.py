"""Names of the widget values of a node in ComfyUI's editor.

Values are listed by position, without names, in the order of the node's declaration: required inputs, then optional
ones. Between them are values of widgets that the editor adds itself, of which the one after a seed (its change after
each run) matters for the count. Inputs that are sockets only have no widget, although older files keep a value for
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from lorasmith.core.registry import Registry
from lorasmith.workflow.editor_graph import EditorNode
from lorasmith.workflow.node import NODES, Node
from lorasmith.workflow.sockets import SCALARS, Input

WidgetNames: TypeAlias = Callable[[str, Sequence[Any]], "Sequence[str | None] | None"]
"""Names of a class's values by position, given the class and the values; None in place of a name for a value of the
editor's own, and None in place of the list for an unknown class."""

SEEDS = ("seed", "noise_seed")
"""Integers of these names have a control after them, unless their declaration says otherwise."""


def names_in(nodes: Registry[Node] = NODES) -> WidgetNames:
    """Names of the values of registered nodes."""

    def names(class_type: str, values: Sequence[Any]) -> Sequence[str | None] | None:
        if class_type not in nodes:
            return None
        inputs = [one for one in nodes[class_type].inputs if one.grow is None and one.type in SCALARS]
        inputs.sort(key=lambda one: one.optional)
        shown = [*_names(one for one in inputs if not one.force_input)]
        every = [*_names(inputs)]
        if len(shown) < len(every) == len(values):
            forced = {one.name for one in inputs if one.force_input}
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
    found = names(node.type, values)
    if found is None:
        if not values or node.named:
            return dict(node.named)
        shown = [*_with_controls(one.widget for one in node.inputs if one.widget is not None)]
        found = without_missing_controls(shown, values)
        if len(found) != len(values):
            return None
    if node.values is None:
        return {name: node.named[name] for name in found if name is not None and name in node.named}
    return {name: value for name, value in zip(found, values, strict=False) if name is not None}


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


def _names(inputs: Sequence[Input] | Iterator[Input]) -> Iterator[str | None]:
    for one in inputs:
        yield one.name
        if one.type == "INT" and one.extras.get("control_after_generate", one.name in SEEDS):
            yield None


def _with_controls(names: Iterator[str]) -> Iterator[str | None]:
    for name in names:
        yield name
        if name in SEEDS:
            yield None


_CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
