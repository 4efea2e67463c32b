"""Progress of a run, and the state from which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Progress", "RunState"]


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to resume bit-identically.

    Attributes:
        step: updates taken.
        tensors: by name.
        numbers: the remaining state, as JSON values.
    """

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


@dataclass
class Progress:
    """Steps taken so far.

    Attributes:
        step: updates taken, skipped ones included.
        losses: of each update, NaN if it was skipped.
        rollbacks: number of rollbacks.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    rollbacks: int = 0
