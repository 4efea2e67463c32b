"""Calling a node function over lists of values, with the semantics of ComfyUI's graphs.

Every input is a list: one item for a value or an ordinary output, any number for a list output. The function is called
once per item of the longest list, shorter ones repeating their last item; or once with the lists if the node declares
that. An ordinary output collects one value per call; list outputs are concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.core.errors import DataError
from lorasmith.workflow.context import NodeContext
from lorasmith.workflow.execution_events import UiOutput
from lorasmith.workflow.node import Node, NodeOutput


@dataclass(frozen=True)
class NodeResult:
    """The items of each output of a node, and its output for user interfaces."""

    outputs: tuple[tuple[Any, ...], ...]
    ui: UiOutput


def call_node(node: Node, lists: Mapping[str, Sequence[Any]], context: NodeContext) -> NodeResult:
    """Call the function of `node` once per item of its inputs; `lists` are by key in the workflow file.

    CancelledError if the run was cancelled between two calls. DataError if an input that takes single items received an
    empty list, or an output is a list of more than 100,000: a few nodes that each double a list make any number.
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
    if any(len(items) > _MOST_ITEMS for items in outputs):
        raise DataError(f"a list must have at most {_MOST_ITEMS:,} items, which {node.id} exceeds; use fewer inputs")
    kinds = dict.fromkeys(kind for result in returned for kind in result.ui)
    ui = {kind: [item for result in returned for item in result.ui.get(kind, ())] for kind in kinds}
    return NodeResult(outputs, ui)


_MOST_ITEMS = 100_000


def _calls(node: Node, lists: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each call."""
    if node.is_input_list:
        yield {name: list(items) for name, items in lists.items()}
        return
    for name, items in lists.items():
        if not items:
            raise DataError(f"{name} must receive at least one item, got an empty list; check the node it is linked to")
    for index in range(max(map(len, lists.values()), default=1)):
        yield {name: items[min(index, len(items) - 1)] for name, items in lists.items()}


def _nested(node: Node, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with a repeating input as one dict: `inputs.input0` → `inputs["input0"]`."""
    growing = [one.name for one in node.inputs if one.grow is not None]
    nested: dict[str, Any] = {name: {} for name in growing}
    for key, value in keywords.items():
        name, _, short = key.partition(".")
        if name in nested:
            nested[name][short] = value
        else:
            nested[key] = value
    return nested
