"""What an executor tells while it runs a graph. Progress bars, logs and the server's messages are made from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = [
    "Event",
    "ExecutionCancelled",
    "ExecutionFailed",
    "ExecutionFinished",
    "ExecutionStarted",
    "NodeCached",
    "NodeFinished",
    "NodeMessage",
    "NodeProgress",
    "NodeStarted",
    "UiOutput",
]

UiOutput: TypeAlias = Mapping[str, Sequence[Any]]
"""What a node shows, by kind: `{"images": [{filename, subfolder, type}, ...]}`. Empty when it shows nothing."""


@dataclass(frozen=True)
class ExecutionStarted:
    """First event of a run: the nodes it needs in the order they will be taken, and those whose outputs are reused."""

    order: tuple[str, ...]
    cached: tuple[str, ...]


@dataclass(frozen=True)
class NodeCached:
    """A node was not run because its inputs are as they were; what it showed then is repeated."""

    node_id: str
    ui: UiOutput


@dataclass(frozen=True)
class NodeStarted:
    """A node begins."""

    node_id: str
    title: str


@dataclass(frozen=True)
class NodeProgress:
    """A running node has done `value` of `maximum` steps.

    Attributes:
        text: one short line about the step, such as a loss; may be empty.
        preview: encoded picture (JPEG or PNG) of the work so far, if there is one.
    """

    node_id: str
    value: int
    maximum: int
    text: str = ""
    preview: bytes | None = None


@dataclass(frozen=True)
class NodeMessage:
    """A running node says something."""

    node_id: str
    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class NodeFinished:
    """A node has run, and shows `ui`."""

    node_id: str
    ui: UiOutput


@dataclass(frozen=True)
class ExecutionFinished:
    """Last event of a run that reached its end."""


@dataclass(frozen=True)
class ExecutionFailed:
    """Last event of a run that a node ended. `error` is a NodeError, or whatever a bug raised."""

    node_id: str
    title: str
    error: Exception


@dataclass(frozen=True)
class ExecutionCancelled:
    """Last event of a run that was asked to stop; `node_id` is the node that was running or would have been next."""

    node_id: str


Event: TypeAlias = (
    ExecutionStarted
    | NodeCached
    | NodeStarted
    | NodeProgress
    | NodeMessage
    | NodeFinished
    | ExecutionFinished
    | ExecutionFailed
    | ExecutionCancelled
)
