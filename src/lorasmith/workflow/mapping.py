"""Calling a node function over lists of values, as ComfyUI's graphs mean it.

Every input arrives as a list: one item for a value or an ordinary output, any number for an output that is a list. The
function is called once per item of the longest, shorter lists repeating their last; or once with the lists themselves
when the node says so. An ordinary output collects one value per call; outputs that are lists are joined end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.core.errors import DataError
from lorasmith.workflow.context import NodeContext
from lorasmith.workflow.execution_events import UiOutput
from lorasmith.workflow.node import Node, NodeOutput

__all__ = ["NodeResult", "call_node"]


@dataclass(frozen=True)
class NodeResult:
    """What a node gave: the items of each output, and what it shows."""

    outputs: tuple[tuple[Any, ...], ...]
    ui: UiOutput


def call_node(node: Node, lists: Mapping[str, Sequence[Any]], context: NodeContext) -> NodeResult:
    """Call the function of `node` as often as its inputs ask for.

    Args:
        node: the node.
        lists: the items of each given input, by key in the workflow file.
        context: first argument of the function.

    Raises:
        CancelledError: the run was cancelled between two calls.
        DataError: an input received an empty list although the node takes single items.
    """
    returned = []
    for keywords in _calls(node, lists):
        context.raise_if_cancelled()
        result = node.function(context, **_nested(node, keywords))
        returned.append(result if isinstance(result, NodeOutput) else NodeOutput(result))
    for result in returned:
        if len(result.values) != len(node.outputs):
            raise TypeError(f"{node.id} must return {len(node.outputs)} values, got {len(result.values)}")
    columns = zip(*(result.values for result in returned), strict=True)
    outputs = tuple(
        tuple(item for value in column for item in value) if output.is_list else tuple(column)
        for output, column in zip(node.outputs, columns, strict=True)
    )
    kinds = dict.fromkeys(kind for result in returned for kind in result.ui)
    ui = {kind: [item for result in returned for item in result.ui.get(kind, ())] for kind in kinds}
    return NodeResult(outputs, ui)


def _calls(node: Node, lists: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Keywords of each call."""
    if node.is_input_list:
        yield {name: list(items) for name, items in lists.items()}
        return
    for name, items in lists.items():
        if not items:
            raise DataError(f"{name} must receive at least one item, got an empty list; check the node it is linked to")
    for index in range(max(map(len, lists.values()), default=1)):
        yield {name: items[min(index, len(items) - 1)] for name, items in lists.items()}


def _nested(node: Node, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with the repetitions of a growing input in one dict: `inputs.input0` → `inputs["input0"]`."""
    growing = [one.name for one in node.inputs if one.grow is not None]
    nested: dict[str, Any] = {name: {} for name in growing}
    for key, value in keywords.items():
        name, _, short = key.partition(".")
        if name in nested:
            nested[name][short] = value
        else:
            nested[key] = value
    return nested
