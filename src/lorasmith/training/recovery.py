"""What is done about a step that fails: smaller pieces, no compiling, or back to the last snapshot.

A step that runs out of memory is taken again in smaller pieces of the same draws, one whose compiled code fails without
compiling. One whose loss or gradient is not finite, or whose loss explodes, is left out: the run goes back to its last
snapshot, halves the learning rate and continues with the draws behind that step. All of it depends on the step and on
what came before alone, so that a run that was interrupted and resumed takes the same turns.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch

from lorasmith.core.errors import TrainingError
from lorasmith.training.engine import Engine
from lorasmith.training.events import EventHandler, RolledBack, Shrunk, Warned
from lorasmith.training.progress import Progress, RunState

__all__ = ["CompileFailed", "Diverged", "OutOfMemory", "Recovery", "StepFault"]


class StepFault(Exception):  # noqa: N818 - faults of a step, which never leave the loop
    """A step that cannot be taken as it is; `Recovery` says what is done instead."""


class OutOfMemory(StepFault):
    """Memory was too small for a step."""


class CompileFailed(StepFault):
    """A step failed in compiled code; the text is what the innermost error says, in a line."""

    def __init__(self, error: BaseException) -> None:
        while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
            error = inner  # torch wraps those of compilers, and adds much advice
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        super().__init__(lines[0].rstrip(".:") if lines else type(error).__name__)


@dataclass(eq=False)
class Diverged(StepFault):
    """The numbers of a step are not finite, or its loss exploded.

    Attributes:
        step: counted from 0.
        loss: of the step.
        images: names of its samples.
        updated: whether it moved the weights: its numbers were finite.
    """

    step: int
    loss: float
    images: tuple[str, ...]
    updated: bool

    def __str__(self) -> str:
        what = (
            f"the loss exploded to {self.loss:.3g}"
            if self.updated
            else "loss and gradient must stay finite but did not"
        )
        return f"{what} at step {self.step + 1} (images: {', '.join(self.images)})"


class Recovery:
    """Changes an engine, and how far it is, so that a run continues behind a fault.

    Args:
        engine: what is trained.
        progress: of the run.
        tell: receives what was done.

    Attributes:
        good: the last snapshot, there before the first step.
        compile_failed: whether compiled code was given up.
    """

    def __init__(self, engine: Engine, progress: Progress, tell: EventHandler) -> None:
        self.good: RunState | None = None
        self.compile_failed = False
        self._engine = engine
        self._progress = progress
        self._tell = tell

    def recover(self, fault: StepFault) -> None:
        """Do what a fault asks for. Raises TrainingError if there is nothing left to do."""
        match fault:
            case OutOfMemory():
                self._shrink(fault)
            case CompileFailed():
                self.stop_compiling()
                self._tell(
                    Warned(
                        message=f"Blocks cannot be compiled here ({fault}): step {self._progress.step + 1} is taken "
                        "again, and the run continues, without compile."
                    )
                )
            case Diverged():
                self._roll_back(fault)
            case _:
                raise fault

    def stop_compiling(self) -> None:
        """Run blocks as they are from now on."""
        self.compile_failed = True
        self._engine.change(compile=False)

    def _shrink(self, fault: OutOfMemory) -> None:
        """Take smaller pieces of a step from now on, and in the end compute activations twice."""
        engine, step = self._engine, self._progress.step + 1
        if engine.runtime.micro_batch > 1:
            engine.change(micro_batch=-(-engine.runtime.micro_batch // 2))
        elif engine.runtime.checkpoint_depth != 1:  # whole blocks take the least
            engine.change(checkpoint_depth=1)
        else:
            raise TrainingError(
                f"memory must hold one image's forward and backward pass, and did not at step {step} with gradient "
                f"checkpointing ({str(fault).splitlines()[0]}); use smaller pictures or a lower rank, or quantization"
            )
        gc.collect()
        if engine.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        runtime = engine.runtime
        also = ", with gradient checkpointing" if runtime.checkpoint_depth else ""
        self._tell(
            Shrunk(
                step=step,
                micro_batch=runtime.micro_batch,
                checkpoint_depth=runtime.checkpoint_depth,
                message=f"Memory ran out at step {step}: it is taken again with the same images, "
                f"{runtime.micro_batch} at a time{also}.",
            )
        )

    def _roll_back(self, fault: Diverged) -> None:
        """Leave a step out and continue behind it, from the last snapshot before it, at half the rate."""
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
        self._tell(
            RolledBack(
                step=progress.step,
                to_step=good.step,
                images=fault.images,
                rate_factor=factor,
                message=f"{fault}; that step is left out, and training continues from step {good.step} at {factor:g} "
                "times the learning rate.",
            )
        )

    def _give_up(self, fault: Diverged, good: RunState) -> None:
        """End the run with the state before a step, or with an earlier one. Raises TrainingError."""
        engine, progress = self._engine, self._progress
        progress.step = fault.step
        kept = "the LoRA as it was before that step is kept"  # for its update was never made
        if fault.updated:
            engine.load(good.tensors, good.numbers)
            progress.step = good.step
            kept = f"the LoRA of step {good.step} is kept"
        del progress.losses[progress.step :]
        times = f", after {progress.rollbacks} times before in this run" if progress.rollbacks else ""
        raise TrainingError(
            f"{fault}{times}; {kept}; try a learning rate below {engine.config.learning_rate:g}"
            + (", or training_dtype fp32" if engine.runtime.dtype != torch.float32 else "")
        )
