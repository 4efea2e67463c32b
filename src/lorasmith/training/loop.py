"""The training loop: steps, and what happens between them.

Watchers (validation, run states, previews) are called between two steps. `recovery` handles failed steps: a fault is an
exception that leaves the prepared model, which is prepared again for the next step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.allocator import has_lost_device, is_of_gpu, is_out_of_memory, memory_missed
from lorasmith.core.errors import LoraError, LorasmithError, TrainingError
from lorasmith.core.kernels import refused_kernels
from lorasmith.core.placement import memory_used
from lorasmith.core.printable import first_line
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.batches import Batch, BatchMaker, prefetched
from lorasmith.training.cuda_graphs import NotReplayable
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.events import EventHandler, Outcome, StepDone, Warned
from lorasmith.training.gradient_starts import start_adapters
from lorasmith.training.memory.sharding import ending_together
from lorasmith.training.memory.spilling import SpillCheck, memory_capped
from lorasmith.training.planning import choose_way
from lorasmith.training.recovery import (
    CompileFailed,
    Diverged,
    NoiseScale,
    OutOfMemory,
    Recovery,
    RunProgress,
    RunState,
    StateNumbers,
    StepFault,
    StepRepeated,
    exploded,
    explosion,
)
from lorasmith.training.step_results import Mailbox, Taken

_SNAPSHOT_STEPS = 25
"""Steps between snapshots: the most that a rollback can cost."""


class Watcher:
    """A callback between two steps; the base class does nothing.

    Attributes:
        name: key of its part of a run state.
        needs_frozen_model: whether it must run without adapters attached.
        needs_bare_model: whether it must run without weights placed as well.
        is_optional: whether a run state may lack its part.
    """

    name: str = ""
    is_optional: bool = False
    needs_frozen_model: bool = False
    needs_bare_model: bool = False

    def begin(self, engine: Engine) -> None:
        """Called before the first step, with the model frozen and no adapters attached."""

    def due(self, loop: Loop) -> bool:
        """Whether to call it after this step; it is called once all losses up to here are known."""
        return False

    def missed(self, loop: Loop) -> bool:
        """Whether to call it before the first step, outside of the prepared model: one that is called after the run
        state of its step was saved may have been left out by a kill.
        """
        return False

    def __call__(self, loop: Loop) -> None:
        """Run it; `loop.stop` ends the run."""

    def end(self, loop: Loop) -> None:
        """Called once after the last step, however the run ended."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its part of a run state: tensors, and JSON values."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore what `state` returned."""


class Loop:
    """A run, between two of its steps.

    `on_event` receives a `StepDone` per step, delayed but in order, and all other events. `cancelled` and `watchers`
    are called between steps. The run is cancelled after step `until`.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample] | EncodedDataset,
        *,
        on_event: EventHandler = lambda event: None,
        cancelled: Callable[[], bool] = lambda: False,
        watchers: Sequence[Watcher] = (),
        until: int | None = None,
    ) -> None:
        self.engine = engine
        self.emit = on_event
        self.outcome: Outcome | None = None  # None while it runs
        self.waited_s: list[float] = []  # seconds that each step waited for its batches
        self._progress = RunProgress()
        self._recovery = Recovery(engine, self._progress, on_event)
        self._samples = samples
        self._until = self.steps if until is None else min(until, self.steps)
        self._cancelled = cancelled
        self._watchers = watchers
        self._mailbox = Mailbox(engine.way.device)
        self._spilling = SpillCheck(engine.way.device)
        self._refusals = 0  # of kernels, emitted
        self._noise = NoiseScale()
        self._taken: dict[int, Taken] = {}
        self._begun = False
        self._torn = False
        self._is_cancelled = False  # the same in all processes

    @property
    def steps(self) -> int:
        return self.engine.config.steps

    @property
    def step(self) -> int:
        """Updates taken, skipped ones included."""
        return self._progress.step

    @property
    def losses(self) -> list[float]:
        """Loss of each update, NaN if it was skipped."""
        return self._progress.losses

    def run(self) -> Outcome:
        """Take the remaining steps. Raises TrainingError after too many rollbacks, or if one sample exceeds memory."""
        device, processes = self.engine.way.device, self.engine.way.processes
        # With sharded weights, an error in one process ends the run in all.
        shared = partial(ending_together, processes, agreed=StepFault) if self.engine.way.sharding else nullcontext
        if self._recovery.good is None:
            self._recovery.good = self._snapshot()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with (
                torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
                memory_capped(device, self.engine.way.memory_cap),
            ):
                missed = [watcher for watcher in self._watchers if self.outcome is None and watcher.missed(self)]
                if missed:
                    self.engine.restore_base_model()
                for watcher in missed:
                    way, model = self.engine.way, self.engine.model
                    with nullcontext() if watcher.needs_bare_model else model.frozen(self.engine.config, way):
                        watcher(self)
                while self.outcome is None:
                    try:
                        with shared(), self.frozen():
                            waiting = self._with_frozen()
                        if waiting:
                            self.engine.restore_base_model()
                        for watcher in waiting:
                            watcher(self)
                    except StepFault as fault:
                        self._recovery.recover(fault.with_traceback(None))  # its frames would keep batches alive
        finally:
            self._settle()
            for watcher in self._watchers:
                watcher.end(self)
        return self.outcome

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the context, the model is frozen in the way of the next steps, which is chosen where it is open."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.engine.frozen())
            self._begin()
            if choose_way(
                self.engine,
                self._samples,
                self.emit,
                step=self.step,
                steps=self._until - self.step,
                thaw=stack.close,
                cancelled=self._cancelled,
            ):
                stack.close()
                stack.enter_context(self.engine.frozen())
            yield

    def record(self, loss: float) -> None:
        """Count a step that was taken outside of `run`."""
        self._progress.step += 1
        self._progress.losses.append(loss)

    def stop(self) -> None:
        self.outcome = Outcome.STOPPED

    @property
    def is_whole(self) -> bool:
        """Whether weights and losses belong to the same step; an interrupted update leaves them inconsistent."""
        return len(self.losses) == self.step and not self._torn

    def state(self) -> RunState:
        """The run state at this step; tensors are copies on the CPU."""
        now, good, engine = self._snapshot(), self._recovery.good, self.engine
        numbers: dict[str, Any] = {
            "engine": now.numbers,
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],
            "rollbacks": self._progress.rollbacks,
            "stopped": self.outcome is Outcome.STOPPED,
            "noise_scale": asdict(self._noise),
            "way": engine.way.to_state(engine.config),
            "layout": engine.flat.layout,
        }
        parts = {"engine": now.tensors}
        if good is not None and good.step != self.step:
            parts["snapshot"] = good.tensors
            numbers["snapshot"] = {"step": good.step, "engine": good.numbers}
        for watcher in self._watchers:
            if watcher.name:
                parts[watcher.name], numbers[watcher.name] = watcher.state()
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        return RunState(self.step, tensors, numbers)

    def load(self, state: RunState) -> None:
        """Restore what `state` returned. Raises LoraError for other adapters, TrainingError for other settings."""
        try:
            self._load(state, StateNumbers.of(state, self.steps))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # The digest matched, so another version wrote it, or it is untrusted.
            raise TrainingError(
                f"a run state must be one that a run of these settings saved, but the state of step {state.step} is "
                f"not ({type(error).__name__}: {error}); start fresh"
            ) from error

    def _load(self, state: RunState, numbers: StateNumbers) -> None:
        engine = self.engine
        if numbers.layout != engine.flat.layout:
            raise LoraError("a run state must hold the trained layers, but this one holds others; start fresh")
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self._noise = numbers.noise_scale
        if (kept := numbers.snapshot) is not None:
            snapshot = RunState(kept.step, parts["snapshot"], asdict(kept.engine))
            engine.load(snapshot.tensors, snapshot.numbers)  # it must fit too, before it is needed
            self._recovery.good = snapshot
        engine.load(parts["engine"], asdict(numbers.engine))
        engine.way = engine.way.resumed(numbers.way)
        for watcher in self._watchers:
            # Early stopping changes no number of a step, so that a run may be resumed with another kind of it.
            if watcher.name and (watcher.name in state.numbers or not watcher.is_optional):
                watcher.load(parts[watcher.name], state.numbers[watcher.name])
        # Last, as a run that ends in an error saves the LoRA of its steps, of which a refused state leaves none.
        self._progress.step = state.step
        self._progress.losses[:] = [math.nan if loss is None else loss for loss in numbers.losses]
        self._progress.rollbacks = numbers.rollbacks
        if numbers.stopped:
            self.stop()  # all that is left is to save the result

    def _with_frozen(self) -> list[Watcher]:
        """Take steps until the run ends or watchers need the bare model; returns those watchers. Raises StepFault."""
        fault: StepFault | None = None
        try:
            start_adapters(self.engine, self._samples)
        except (RuntimeError, MemoryError) as error:
            if self.engine.way.sharding or not is_out_of_memory(error):
                raise
            fault = OutOfMemory(memory_missed(error))
        if fault is not None:  # outside of `except`, as in `_take`
            raise fault
        while True:
            with self.engine.attached():
                waiting = self._take_steps()
            bare = [watcher for watcher in waiting if watcher.needs_bare_model]
            if len(bare) < len(waiting):
                self.engine.restore_base_model(frozen=True)
            for watcher in waiting:
                if watcher not in bare:
                    watcher(self)
            if bare or self.outcome is not None:
                return bare

    def _take_steps(self) -> list[Watcher]:
        """Take steps until the run ends or watchers are due that need no adapters attached; returns those watchers.

        Raises StepFault.
        """
        engine = self.engine
        maker = batch_maker(engine.model, self._samples, engine.config, engine.way, engine.rank_masks)
        first = engine.steps_before
        with contextlib.closing(prefetched(maker, range(first + self.step, first + self._until))) as coming:
            # Several processes agree on it with the sum of the gradient.
            is_ended = self._cancelled if engine.way.processes.size == 1 else lambda: self._is_cancelled
            while self.step < self._until and not is_ended():
                self._take(maker, coming)
                waiting = self._between()
                if waiting or self.outcome:
                    return waiting
        self._collect(wait=True)
        self.outcome = Outcome.FINISHED if self.step == self.steps else Outcome.CANCELLED
        return []

    def _take(self, maker: BatchMaker, coming: Iterator[tuple[int, list[Batch]]]) -> None:
        """Take one step. Raises OutOfMemory and CompileFailed."""
        batches: list[Batch] = []
        own: tuple[Tensor, Tensor] | None = None
        fault: StepFault | None = None
        try:
            # The next step's batch is copied to the device while this one runs, so memory may run out there as well.
            began = time.perf_counter()
            _, batches = next(coming)
            self.waited_s.append(time.perf_counter() - began)
            self._mailbox.begin()
            own = self.engine.gradient(batches)
        except Exception as error:
            if has_lost_device(error):
                raise TrainingError(
                    f"the GPU must finish step {self.step + 1}, but failed ({first_line(error)}), after which this "
                    "process cannot use it; run the same command again, which continues from the last run state"
                ) from error
            if self.engine.way.sharding:
                raise  # the others wait in the same pass
            if is_out_of_memory(error):
                fault = OutOfMemory(memory_missed(error))
            elif isinstance(error, NotReplayable):
                self.engine.way = replace(self.engine.way, cuda_graphs=False)
                fault = StepRepeated(
                    f"cuda_graphs needs a pass that the GPU repeats alone, but that of {self.engine.model.title} "
                    f"{error}; step {self.step + 1} is repeated and the run continues without."
                )
            elif batches and self.engine.way.compile and not isinstance(error, LorasmithError):
                fault = CompileFailed(error)  # compilers raise any kind; another cause will be raised again
            elif is_of_gpu(error):
                raise TrainingError(
                    f"the GPU's libraries must compute step {self.step + 1}, but failed ({first_line(error)}); install "
                    "a torch built for this GPU and a driver for that torch, then run the same command again"
                ) from error
            else:
                raise
        # Outside of `except`, where the error's frames no longer hold activations.
        gradient, fault = self._agreed(batches, own, fault)
        if fault is not None:
            raise fault
        assert gradient is not None
        self._torn = True
        self._taken[self.step] = Taken.of(batches, maker.drawn(self.engine.steps_before + self.step))
        self._mailbox.post(self.step, self.engine.update(self.step, *gradient))
        self._progress.step += 1
        self._torn = False

    def _agreed(
        self, batches: Sequence[Batch], own: tuple[Tensor, Tensor] | None, fault: StepFault | None
    ) -> tuple[tuple[Tensor, Tensor] | None, StepFault | None]:
        """The gradient over all processes. Raises the fault of any of them in all, so that all repeat the step."""
        engine, processes = self.engine, self.engine.way.processes
        if processes.size == 1:
            return own, fault
        gradient = engine.summed(batches, own)
        flags = [isinstance(fault, OutOfMemory), isinstance(fault, CompileFailed), self._cancelled()]
        full, uncompiled, cancelled = processes.summed(flags)
        self._is_cancelled = cancelled > 0
        elsewhere = "in another process"
        if full:
            return gradient, fault if isinstance(fault, OutOfMemory) else OutOfMemory(elsewhere)
        if uncompiled:
            return gradient, fault or CompileFailed(RuntimeError(elsewhere))
        return gradient, None

    def _between(self) -> list[Watcher]:
        """Run the due watchers; returns those that need the model without adapters. Raises Diverged."""
        # All processes read the results of the same steps, whenever these arrive, so that all roll back after the same
        # step. The device already has the next step.
        self._collect(before=None if self.engine.way.processes.size == 1 else self.step - 1)
        due = [watcher for watcher in self._watchers if watcher.due(self)]
        is_snapshot_due = self.step % _SNAPSHOT_STEPS == 0
        if due or is_snapshot_due:
            self._collect(wait=True)
        if is_snapshot_due:
            self.engine.check_same_weights()
            self._recovery.good = self._snapshot()
        for watcher in due:
            if not watcher.needs_frozen_model and not watcher.needs_bare_model:
                watcher(self)
        return [watcher for watcher in due if watcher.needs_frozen_model or watcher.needs_bare_model]

    def _collect(self, *, wait: bool = False, before: int | None = None) -> None:
        """Process the results that have arrived from the device, as `Mailbox.collect`. Raises Diverged."""
        for step, (sound, norm, first, *losses), seconds in self._mailbox.collect(wait=wait, before=before):
            taken = self._taken.pop(step)
            self.losses.append(math.fsum(losses) / len(losses))
            if not sound or exploded(self.losses):
                self._mailbox = Mailbox(self.engine.way.device)  # later steps do not count
                self._taken.clear()
                bound, loss = explosion(self.losses), self.losses.pop()
                layers = () if sound or not math.isfinite(loss) else tuple(self.engine.non_finite_gradients())
                raise Diverged(step, loss, taken.at_fault(losses, bound), updated=bool(sound), layers=layers)
            if math.isfinite(norm):
                whole, small = len(losses), taken.first
                self._noise.update((first * whole / small) ** 2, norm**2, small=small, big=whole)
            self.emit(
                StepDone(
                    step=step + 1,
                    loss=self.losses[-1],
                    grad_norm=norm,
                    learning_rate=self.engine.learning_rate_at(step),
                    draws=tuple(zip(taken.indices, taken.quantiles, losses, strict=True)),
                    noise_scale=self._noise.value or 0.0,
                    memory_bytes=memory_used(self.engine.way.device),
                )
            )
            if warning := self._spilling.warning(step + 1, taken.shapes, seconds):
                self.emit(Warned(message=warning))
            for refusal in refused_kernels(since=self._refusals):
                self._refusals += 1
                self.emit(Warned(message=refusal))

    def _settle(self) -> None:
        """Process the results still in transit after an error."""
        if not self._torn:
            with contextlib.suppress(Exception):  # that error is the one to raise
                self._collect(wait=True)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            for watcher in self._watchers:
                watcher.begin(self.engine)

    def _snapshot(self) -> RunState:
        return RunState(self.step, *self.engine.state())
