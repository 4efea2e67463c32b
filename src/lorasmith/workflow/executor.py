"""Executor of checked graphs: runs the nodes that outputs need, in dependency order, and reuses unchanged results.

A node's outputs are cached under a signature of its class, its values, the state of its files and the signatures of the
nodes it is linked to. Only the last run's outputs are kept; those that the next run does not need are released before
it starts, so that a replaced model frees its memory first.

Every input is a list: one item for a value or an ordinary output, any number for a list output. A node's function is
called once per item of the longest list, shorter ones repeating their last item; or once with the lists if the node
declares that. An ordinary output collects one value per call; list outputs are concatenated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.core.errors import CancelledError, DataError, LorasmithError, NodeError
from lorasmith.core.files import check_writable
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.workflow.execution_events import (
    Event,
    ExecutionCancelled,
    ExecutionFailed,
    ExecutionFinished,
    ExecutionStarted,
    NodeCached,
    NodeFinished,
    NodeStarted,
    UiOutput,
)
from lorasmith.workflow.graph import Graph, GraphNode, Link
from lorasmith.workflow.node import Node, NodeContext, NodeOutput, ignore

_PREFIX = "filename_prefix"  # input of nodes that save files in the output folder
_MOST_ITEMS = 100_000


class Executor:
    """Runs graphs one after another, caching outputs; `on_event` is called in the executing thread."""

    def __init__(self, folders: Folders, *, on_event: Callable[[Event], None] = ignore) -> None:
        self._folders = folders
        self._on_event = on_event
        self._kept: dict[str, NodeResult] = {}

    def run(
        self, graph: Graph, *, workflow: Mapping[str, Any] | None = None, cancel: threading.Event | None = None
    ) -> dict[str, NodeResult]:
        """Run `graph` and return each node's outputs by node id.

        `workflow` is the editor's JSON of the same graph, for saved files. Set `cancel` from any thread to stop before
        the next node, or earlier if the node checks it: CancelledError, with finished nodes cached for the next run.
        NodeError if a node failed, or inputs cannot work together.
        """
        cancel = cancel or threading.Event()
        signatures = self._signatures(graph)
        self._kept = {key: self._kept[key] for key in signatures.values() if key in self._kept}
        cached = tuple(key for key in graph.nodes if signatures[key] in self._kept)
        self._on_event(ExecutionStarted(tuple(graph.nodes), cached))
        for key, member in graph.nodes.items():  # refuse before any node runs
            saves = _PREFIX in member.node.slots
            check = None if key in cached else member.node.check
            if saves or check is not None:
                with self._reporting(member):
                    if saves:
                        check_writable(self._folders.output)
                    if check is not None:
                        check(graph, member, self._folders)
        results: dict[str, NodeResult] = {}
        for key, member in graph.nodes.items():
            context = NodeContext(self._folders, key, graph.prompt, workflow, cancel, self._on_event)
            with self._reporting(member):
                results[key] = self._result(member, signatures[key], results, context)
        self._on_event(ExecutionFinished())
        return results

    def _result(
        self, member: GraphNode, signature: str, results: Mapping[str, NodeResult], context: NodeContext
    ) -> NodeResult:
        context.raise_if_cancelled()
        # Looked up here again, as two equal nodes of one graph share the result of the first.
        kept = self._kept.get(signature)
        if kept is not None:
            self._on_event(NodeCached(member.id, kept.ui))
            return kept
        self._on_event(NodeStarted(member.id, member.title))
        lists = self._input_lists(member, results)
        result = call_node(member.node, lists, context)
        # A cancelled node may have returned a partial result, which must not be cached.
        if not context.cancelled():
            self._kept[signature] = result
        self._on_event(NodeFinished(member.id, result.ui))
        return result

    def _input_lists(self, member: GraphNode, results: Mapping[str, NodeResult]) -> dict[str, list[Any]]:
        """The items of each input; linked scalars are checked like literal ones."""
        lists = {}
        for name, slot in member.node.slots.items():
            value = member.inputs.get(name)
            if isinstance(value, Link):
                items = results[value.node_id].outputs[value.output]
                lists[name] = [slot.check_linked(item, self._folders) for item in items]
            elif name in member.inputs:
                lists[name] = [value]
        return lists

    def _signatures(self, graph: Graph) -> dict[str, str]:
        """Signatures by node id; equal if the outputs are expected to be equal."""
        signatures: dict[str, str] = {}
        for key, member in graph.nodes.items():
            with self._reporting(member):
                parts = {
                    "class": member.node.id,
                    "id": key if "unique_id" in member.node.hidden else None,
                    "files": _files(member, self._folders),
                    "inputs": {
                        name: ["link", signatures[value.node_id], value.output]
                        if isinstance(value, Link)
                        else ["value", value]
                        for name, value in member.inputs.items()
                    },
                }
            signatures[key] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return signatures

    @contextlib.contextmanager
    def _reporting(self, member: GraphNode) -> Iterator[None]:
        """Report an exception inside the context as the last event of the run, naming the node."""
        try:
            yield
        except CancelledError as error:
            self._on_event(ExecutionCancelled(member.id))
            raise CancelledError(f"{member.label}: {error}") from error
        except LorasmithError as error:
            named = NodeError(f"{member.label}: {error}")
            self._on_event(ExecutionFailed(member.id, member.title, named))
            raise named from error
        except Exception as error:  # a bug: reported and raised unchanged
            self._on_event(ExecutionFailed(member.id, member.title, error))
            error.add_note(f"while running {member.label} ({member.node.id})")
            raise


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


def _files(member: GraphNode, folders: Folders) -> object:
    """The state of the files that the node's inputs name."""
    states = []
    for name, slot in member.node.slots.items():
        if slot.file is not None and name in member.inputs:
            value = member.inputs[name]
            if isinstance(value, Link):
                # The file is known only after the linked node has run, so a cached result cannot be used.
                return uuid.uuid4().hex
            states.append(None if (path := slot.file(folders, value)) is None else fingerprint(path))
    return states


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
    growing = [slot.name for slot in node.inputs if slot.grow is not None]
    nested: dict[str, Any] = {name: {} for name in growing}
    for key, value in keywords.items():
        name, _, short = key.partition(".")
        if name in nested:
            nested[name][short] = value
        else:
            nested[key] = value
    return nested
