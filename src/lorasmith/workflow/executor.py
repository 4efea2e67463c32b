"""Executor of checked graphs: runs the nodes that outputs need, in dependency order, and reuses unchanged results.

A node's outputs are cached under a signature of its class, its values, the state of its files and the signatures of the
nodes it is linked to. Only the last run's outputs are kept; those that the next run does not need are released before
it starts, so that a replaced model frees its memory first.
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
from lorasmith.core.files import check_writable
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

_PREFIX = "filename_prefix"  # input of nodes that save files in the output folder


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


def _outside(member: GraphNode, folders: Folders) -> object:
    """The node's fingerprint: what its result depends on besides its inputs."""
    if member.node.fingerprint is None:
        return None
    _, *names = inspect.signature(member.node.fingerprint).parameters
    values = {name: member.inputs[name] for name in names if name in member.inputs}
    if any(isinstance(value, Link) for value in values.values()):
        # The file is known only after the linked node has run, so a cached result cannot be used.
        return uuid.uuid4().hex
    return member.node.fingerprint(folders, **values)
