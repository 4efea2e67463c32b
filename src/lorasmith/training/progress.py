"""Progress of a run, and the state from which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorasmith.core.typed_json import typed


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to resume bit-identically."""

    step: int  # updates taken
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]  # the remaining state, as JSON values


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0  # updates taken, skipped ones included
    losses: list[float] = field(default_factory=list)  # of each update, NaN if it was skipped
    rollbacks: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimizerNumbers:
    """What a run state holds of the optimizer besides tensors; see `GatedOptimizer.state`."""

    started: bool
    parameters: dict[str, float | bool | None]
    groups: list[dict[str, float | bool | None]]


@dataclass(frozen=True, kw_only=True)
class EngineNumbers:
    """What a run state or a snapshot holds of the engine besides tensors; see `Engine.state`."""

    optimizer: OptimizerNumbers
    rate_factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate_factor <= 1:
            raise ValueError(f"rate_factor must be from 0 to 1, got {self.rate_factor}")


@dataclass(frozen=True, kw_only=True)
class SnapshotNumbers:
    """What a run state holds of the last snapshot, if that was taken at another step."""

    step: int
    engine: EngineNumbers


@dataclass(frozen=True, kw_only=True)
class NoiseNumbers:
    """What a run state holds of the gradient noise scale; see `NoiseScale.to_json`."""

    decay: float
    true_sq: float
    variance: float


@dataclass(frozen=True, kw_only=True)
class StateNumbers:
    """The numbers of a run state, as `Loop.state` writes them. Raises ValueError if one is out of range."""

    engine: EngineNumbers
    losses: tuple[float | None, ...]
    rollbacks: int
    stopped: bool
    noise_scale: NoiseNumbers
    micro_batch: int
    checkpoint_depth: int
    eager: bool
    layout: list[Any]
    snapshot: SnapshotNumbers | None = None

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.checkpoint_depth < 0 or self.rollbacks < 0:
            raise ValueError("micro_batch, checkpoint_depth or rollbacks are out of range")

    @classmethod
    def of(cls, state: RunState, steps: int) -> StateNumbers:
        """The numbers of a state. Raises ValueError if one is missing, of another type, or contradicts the step."""
        numbers = typed(state.numbers, cls)
        if not 0 <= state.step == len(numbers.losses) <= steps:
            raise ValueError(f"step must be the number of losses and at most {steps}, got {state.step}")
        return numbers
