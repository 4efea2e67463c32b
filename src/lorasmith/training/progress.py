"""How far a run is, and what it needs to continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Progress", "RunState"]


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to continue to the bit.

    Attributes:
        step: updates taken.
        tensors: by name.
        numbers: the rest, as JSON has it.
    """

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


@dataclass
class Progress:
    """Steps behind a run.

    Attributes:
        step: updates taken, those that were left out included.
        losses: of each of them, NaN where it was left out.
        rollbacks: how often the run went back.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    rollbacks: int = 0
