"""Events of an executor, for progress bars, logs and the server's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

UiOutput: TypeAlias = Mapping[str, Sequence[Any]]
"""Output of a node for user interfaces, by kind: `{"images": [{filename, subfolder, type}, ...]}`; may be empty."""


@dataclass(frozen=True)
class ExecutionStarted:
    """First event of a run: the needed nodes in order of execution, and those with reused outputs."""

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
    """A running node has done `value` of `maximum` steps."""

    node_id: str
    value: int
    maximum: int
    text: str = ""  # one short line, such as a loss; may be empty
    preview: bytes | None = None  # JPEG or PNG of the current result


@dataclass(frozen=True)
class NodeMessage:
    """A message of a running node."""

    node_id: str
    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class NodeReport:
    """A report of a running node for programs, as JSON values; of `kind` `view` it is a `RunView`."""

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
