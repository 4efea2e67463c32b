"""Run states, and recovery from failed steps: a smaller way, no compiling, or a rollback to the last snapshot.

A step that runs out of memory is repeated in the next smaller way (`Way.smaller`), with the same draws; one whose
compiled code fails, without compiling. A step with a non-finite loss or gradient, or an exploding
loss, is skipped: the run restores its last snapshot, halves the learning rate and continues with the draws after that
step. All decisions are functions of the step and its past, so that a resumed run makes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import TrainingError
from lorasmith.core.placement import free_device_memory, memory_beside
from lorasmith.core.printable import first_line
from lorasmith.core.typed_json import typed
from lorasmith.training.engine import Engine
from lorasmith.training.events import EventHandler, RolledBack, Shrunk, Warned
from lorasmith.training.way import WayState, state_of_earlier


class StepFault(Exception):  # noqa: N818 - faults of a step, which never leave the loop
    """A step that failed; handled by `Recovery`."""


class StepRepeated(StepFault):
    """A step is repeated in another way, described by the message."""


class OutOfMemory(StepFault):
    """Memory ran out in a step."""


class CompileFailed(StepFault):
    """A step failed in compiled code; the text is the first line of the innermost error."""

    def __init__(self, error: BaseException) -> None:
        while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
            error = inner  # torch wraps errors of compilers in long advice
        super().__init__(first_line(error))


@dataclass(eq=False)
class Diverged(StepFault):
    """A step's loss or gradient is not finite, or its loss exploded."""

    step: int  # counted from 0
    loss: float
    images: tuple[str, ...]  # whose own loss is at fault
    updated: bool  # whether it updated the weights: loss and gradient were finite
    layers: tuple[str, ...] = ()  # paths of those whose gradient is not finite, although the loss is

    def __str__(self) -> str:
        images = f" (images: {', '.join(self.images)})" if self.images else ""
        return f"{self._what} at step {self.step + 1}{images}"

    @property
    def _what(self) -> str:
        if self.updated:
            return f"the loss exploded to {self.loss:.3g}"
        if not math.isfinite(self.loss):
            return "the loss became NaN or infinite"
        match self.layers:
            case ():
                return "the gradient became NaN or infinite"
            case (layer,):
                return f"the gradient of {layer} became NaN or infinite"
            case layers:
                return f"the gradient of {len(layers)} layers, such as {layers[-1]}, became NaN or infinite"


class Recovery:
    """Changes engine and progress so that a run continues after a fault."""

    def __init__(self, engine: Engine, progress: RunProgress, on_event: EventHandler) -> None:
        # The last snapshot, set before the first step.
        self.good: RunState | None = None
        self._engine = engine
        self._progress = progress
        self._emit = on_event

    def recover(self, fault: StepFault) -> None:
        """Recover from a fault. Raises TrainingError if that is not possible."""
        match fault:
            case StepRepeated():
                self._emit(Warned(message=str(fault)))
            case OutOfMemory():
                self._shrink(fault)
            case CompileFailed():
                self._engine.way = self._engine.way.uncompiled
                self._emit(
                    Warned(
                        message=f"Blocks cannot be compiled here ({fault}): step {self._progress.step + 1} is repeated "
                        "and the run continues without compile; lorasmith doctor says whether a compiler is missing."
                    )
                )
            case Diverged():
                self._roll_back(fault)
            case _:
                raise fault

    def _shrink(self, fault: OutOfMemory) -> None:
        """Take the next smaller way, for the rest of the run. Raises TrainingError if there is none."""
        engine, before, step = self._engine, self._engine.way, self._progress.step + 1
        found = before.smaller(engine.config)
        if found is None:
            beside, close = "", ""
            if before.device.type == "cuda":
                beside, close = f"; {memory_beside(before.device)}", "close other programs, "
            raise TrainingError(
                f"memory must hold one image's forward and backward pass, but ran out at step {step} with activation "
                f"checkpointing ({fault}{beside}); {close}use smaller pictures or a lower rank, or quantization"
            )
        engine.way, how = found
        free_device_memory()
        message = f"Memory ran out at step {step}: it is repeated {how}."
        micro_batch, depth = engine.way.micro_batch, engine.way.checkpoint_depth
        if (micro_batch, depth) == (before.micro_batch, before.checkpoint_depth):
            self._emit(Warned(message=message))
        else:
            self._emit(Shrunk(step=step, micro_batch=micro_batch, checkpoint_depth=depth, message=message))

    def _roll_back(self, fault: Diverged) -> None:
        engine, progress, good = self._engine, self._progress, self.good
        assert good is not None  # there is one before the first step
        fruitless = fault.step + 1 == engine.config.steps and not any(map(math.isfinite, progress.losses))
        if progress.rollbacks == engine.config.max_rollbacks or fruitless:
            self._give_up(fault, good)
        factor = engine.rate_factor / 2
        engine.load(good.tensors, good.numbers)
        engine.rate_factor = factor
        progress.losses.append(math.nan)
        progress.step = fault.step + 1
        progress.rollbacks += 1
        self._emit(
            RolledBack(
                step=progress.step,
                to_step=good.step,
                images=fault.images,
                layers=fault.layers,
                rate_factor=factor,
                message=f"{fault}; that step is skipped, and training continues from step {good.step} at {factor:g} "
                "times the learning rate.",
            )
        )

    def _give_up(self, fault: Diverged, good: RunState) -> None:
        """End the run with the weights before a step, or of the last snapshot. Raises TrainingError."""
        engine, progress = self._engine, self._progress
        progress.step = fault.step
        kept = "the LoRA before that step is kept"  # the update was not made
        if fault.updated:
            engine.load(good.tensors, good.numbers)
            progress.step = good.step
            kept = f"the LoRA of step {good.step} is kept"
        del progress.losses[progress.step :]
        times = f", after {progress.rollbacks} rollbacks in this run" if progress.rollbacks else ""
        raise TrainingError(
            f"{fault}{times}; {kept}; try a learning rate below {engine.config.learning_rate:g}"
            + (", or training_dtype fp32" if engine.way.dtype != torch.float32 else "")
            + (", or leave that layer out, with ! in targets" if len(fault.layers) == 1 else "")
        )


_FACTOR = 10.0
_LAG = 10
_WINDOW = 100
_ENOUGH = 20


def exploded(losses: Sequence[float]) -> bool:
    """Whether the last loss exceeds the bound of `explosion`; pure."""
    return losses[-1] > explosion(losses)


def explosion(losses: Sequence[float]) -> float:
    """Ten times the largest of the hundred losses that end ten steps before the last; infinite if these are few.

    A window, since losses differ by orders of magnitude between noise levels; the gap detects a loss that doubles with
    each step. NaN entries, of skipped steps, do not count.
    """
    before = [loss for loss in losses[-_LAG - _WINDOW - 1 : -_LAG - 1] if math.isfinite(loss)]
    return _FACTOR * max(before) if len(before) >= _ENOUGH else math.inf


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to resume bit-identically."""

    step: int  # updates taken
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]  # the remaining state, as JSON values


@dataclass
class RunProgress:
    """RunProgress of a run."""

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


@dataclass(kw_only=True)
class NoiseScale:
    """The gradient noise scale: the batch size above which larger batches bring diminishing returns.

    McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, appendix A.1. The squared
    norm of a gradient averaged over b samples is expected to be |G|² + tr(Σ) / b, where G is the true gradient and Σ
    the covariance of a single sample's. Two batch sizes give two equations, and the simple noise scale is tr(Σ) / |G|²:
    the ratio of moving averages of both terms, as an average of ratios would be biased.

    Both sizes are available only if a step accumulates over at least two micro-batches: the first of them is the small
    one, the step the big one. Stratified noise levels reduce the noise; the estimate is of the remaining noise.
    """

    decay: float = 0.99
    true_sq: float = 0.0
    variance: float = 0.0

    def update(self, small_sq: float, big_sq: float, *, small: int, big: int) -> None:
        """Add a step; arguments as for `noise_terms`. A step with a single micro-batch is ignored."""
        if small >= big:
            return
        true_sq, variance = noise_terms(small_sq, big_sq, small=small, big=big)
        # Both start at 0, so both averages are too small by the same factor, which the ratio does not see.
        self.true_sq = self.decay * self.true_sq + (1 - self.decay) * true_sq
        self.variance = self.decay * self.variance + (1 - self.decay) * variance

    @property
    def value(self) -> float | None:
        """The noise scale in samples; None while the estimates are not positive (at first, or by chance)."""
        if self.true_sq <= 0 or self.variance < 0:
            return None
        return self.variance / self.true_sq


def noise_terms(small_sq: float, big_sq: float, *, small: float, big: float) -> tuple[float, float]:
    """Unbiased estimates of |G|² and tr(Σ); single ones are very noisy, and either may be negative.

    `small_sq` and `big_sq` are squared norms of the mean gradient over `small` and over `big` samples, `small` < `big`.
    """
    true_sq = (big * big_sq - small * small_sq) / (big - small)
    variance = (small_sq - big_sq) / (1 / small - 1 / big)
    return true_sq, variance


@dataclass(frozen=True, kw_only=True)
class StateNumbers:
    """The numbers of a run state, as `Loop.state` writes them. Raises ValueError if one is out of range."""

    engine: EngineNumbers
    losses: tuple[float | None, ...]
    rollbacks: int
    stopped: bool
    noise_scale: NoiseScale
    way: WayState
    layout: list[Any]
    snapshot: SnapshotNumbers | None = None

    def __post_init__(self) -> None:
        if self.rollbacks < 0:
            raise ValueError("rollbacks are out of range")

    @classmethod
    def of(cls, state: RunState, steps: int) -> StateNumbers:
        """The numbers of a state. Raises ValueError if one is missing, of another type, or contradicts the step."""
        numbers = typed(state_of_earlier(state.numbers), cls)
        if not 0 <= state.step == len(numbers.losses) <= steps:
            raise ValueError(f"step must be the number of losses and at most {steps}, got {state.step}")
        return numbers
