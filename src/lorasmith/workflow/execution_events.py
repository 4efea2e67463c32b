"""Events of an executor, the source of progress bars, logs and the server's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

UiOutput: TypeAlias = Mapping[str, Sequence[Any]]
"""Output of a node for user interfaces, by kind: `{"images": [{filename, subfolder, type}, ...]}`; may be empty."""


@dataclass(frozen=True)
class ExecutionStarted:
    """First event of a run: the needed nodes in order of execution, and those whose outputs are reused."""

    order: tuple[str, ...]
    cached: tuple[str, ...]


@dataclass(frozen=True)
class NodeCached:
    """A node was not run because its inputs are unchanged; its previous output is repeated."""

    node_id: str
    ui: UiOutput


@dataclass(frozen=True)
class NodeStarted:
    """A node starts."""

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
    """A message of a running node."""

    node_id: str
    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class NodeReport:
    """What a running node reports for programs, besides its messages and progress for people.

    Attributes:
        node_id: of the node.
        kind: of the report; `training` is an event of a run.
        data: JSON values.
    """

    node_id: str
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class NodeFinished:
    """A node has finished, with output `ui`."""

    node_id: str
    ui: UiOutput


@dataclass(frozen=True)
class ExecutionFinished:
    """Last event of a completed run."""


@dataclass(frozen=True)
class ExecutionFailed:
    """Last event of a failed run. `error` is a NodeError, or another exception caused by a bug."""

    node_id: str
    title: str
    error: Exception


@dataclass(frozen=True)
class ExecutionCancelled:
    """Last event of a cancelled run; `node_id` is the running node, or the next one."""

    node_id: str


Event: TypeAlias = (
    ExecutionStarted
    | NodeCached
    | NodeStarted
    | NodeProgress
    | NodeMessage
    | NodeReport
    | NodeFinished
    | ExecutionFinished
    | ExecutionFailed
    | ExecutionCancelled
)
