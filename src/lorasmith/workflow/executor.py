"""Runs checked graphs: what outputs need, in dependency order, each node once, reusing what has not changed.

A node's outputs are kept under a signature made from its class, its values, what its files are like and the signatures
of the nodes it is linked to. A later run of the same executor takes them from there. Only the last run's are kept, and
those that the next run has no use for are let go before it begins, so that a replaced model makes room for the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorasmith.core.errors import CancelledError, LorasmithError, NodeError
from lorasmith.core.folders import Folders
from lorasmith.workflow.context import NodeContext, ignore
from lorasmith.workflow.execution_events import (
    Event,
    ExecutionCancelled,
    ExecutionFailed,
    ExecutionFinished,
    ExecutionStarted,
    NodeCached,
    NodeFinished,
    NodeStarted,
)
from lorasmith.workflow.graph import Graph, GraphNode, Link
from lorasmith.workflow.mapping import NodeResult, call_node

__all__ = ["Executor"]


class Executor:
    """Runs graphs one after another, keeping outputs between them.

    Args:
        folders: handed to the nodes.
        on_event: called with each `Event`, in the thread that runs.
    """

    def __init__(self, folders: Folders, *, on_event: Callable[[Event], None] = ignore) -> None:
        self._folders = folders
        self._on_event = on_event
        self._kept: dict[str, NodeResult] = {}

    def run(
        self, graph: Graph, *, workflow: Mapping[str, Any] | None = None, cancel: threading.Event | None = None
    ) -> dict[str, NodeResult]:
        """Run `graph` and return each node's outputs by node id.

        Args:
            graph: what `validate` returned.
            workflow: the editor's JSON of the same graph, for nodes that write it into their files.
            cancel: set it from anywhere to stop the run before its next node, or sooner where a node looks at it.

        Raises:
            NodeError: a node refused; the sentence names it.
            CancelledError: `cancel` was set. What finished before is kept for the next run.
        """
        cancel = cancel or threading.Event()
        signatures = self._signatures(graph)
        self._kept = {key: self._kept[key] for key in signatures.values() if key in self._kept}
        cached = tuple(key for key in graph.nodes if signatures[key] in self._kept)
        self._on_event(ExecutionStarted(tuple(graph.nodes), cached))
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
        # Looked up anew here, since two equal nodes of one graph share what the first of them made.
        kept = self._kept.get(signature)
        if kept is not None:
            self._on_event(NodeCached(member.id, kept.ui))
            return kept
        self._on_event(NodeStarted(member.id, member.title))
        lists = self._input_lists(member, results)
        result = call_node(member.node, lists, context)
        # A node that was told to stop may have returned half of its work, which must not pass for the whole later.
        if not context.cancelled():
            self._kept[signature] = result
        self._on_event(NodeFinished(member.id, result.ui))
        return result

    def _input_lists(self, member: GraphNode, results: Mapping[str, NodeResult]) -> dict[str, list[Any]]:
        """The items of each given input; linked scalars are held to the same ranges and choices as written ones."""
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
        """By node id; equal when the outputs can be expected to be equal."""
        signatures: dict[str, str] = {}
        for key, member in graph.nodes.items():
            with self._reporting(member):
                parts = {
                    "class": member.node.id,
                    "id": key if "unique_id" in member.node.hidden else None,
                    "fingerprint": _outside(member, self._folders),
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
        """Whatever ends the run inside is told as its last event, and names the node."""
        try:
            yield
        except CancelledError as error:
            self._on_event(ExecutionCancelled(member.id))
            raise CancelledError(f"{member.label}: {error}") from error
        except LorasmithError as error:
            named = NodeError(f"{member.label}: {error}")
            self._on_event(ExecutionFailed(member.id, member.title, named))
            raise named from error
        except Exception as error:  # a bug: told to listeners like any other end, and left as it is
            self._on_event(ExecutionFailed(member.id, member.title, error))
            error.add_note(f"while running {member.label} ({member.node.id})")
            raise


def _outside(member: GraphNode, folders: Folders) -> object:
    """What the node's result depends on besides its inputs, in its own words."""
    if member.node.fingerprint is None:
        return None
    _, *names = inspect.signature(member.node.fingerprint).parameters
    values = {name: member.inputs[name] for name in names if name in member.inputs}
    if any(isinstance(value, Link) for value in values.values()):
        # Which file it will be is known only once the link has delivered, so nothing kept can be trusted.
        return uuid.uuid4().hex
    return member.node.fingerprint(folders, **values)
