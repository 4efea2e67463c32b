"""The training loop: steps, and what happens between them.

Watchers (validations, checkpoints, previews) are called between two steps. A step whose loss or gradient is not finite,
or whose loss explodes, is left out: the loop goes back to its last snapshot, halves the learning rate and goes on with
the draws behind that step. A step that runs out of memory is taken again in smaller pieces, of the same draws; one
whose compiled code fails, without compiling. All of it depends on the step and on what came before alone, so that a run
that was killed and resumed takes the same turns.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.difference import Difference
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import LoraError, LorasmithError, TrainingError
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Denoiser
from lorasmith.training.batches import Batch, prefetched
from lorasmith.training.divergence import exploded
from lorasmith.training.engine import Engine, Recipe, batch_maker
from lorasmith.training.events import EventHandler, Planned, RolledBack, Shrunk, StepDone, Warned
from lorasmith.training.mailbox import Mailbox
from lorasmith.training.memory.compilation import reason
from lorasmith.training.memory.memory_plan import plan_for
from lorasmith.training.noise_scale import NoiseScale

__all__ = ["Loop", "RunState", "Watcher", "fit"]

_SNAPSHOT_STEPS = 25
"""Steps between snapshots, which is how much a roll-back can cost."""


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on, to the bit.

    Attributes:
        step: updates taken.
        tensors: by name.
        numbers: whatever else there is, as JSON has it.
    """

    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Watcher:
    """Something that happens between two steps; the base class does nothing.

    Attributes:
        name: key of its own state in a checkpoint.
        bare: whether it needs the model as it was before training.
    """

    name: str = ""
    bare: bool = False

    def begin(self, engine: Engine) -> None:
        """Called before the first step, with the model frozen and none of the trained adapters attached."""

    def due(self, loop: Loop) -> bool:
        """Whether it wants to be called now; all losses up to this step are known then."""
        return False

    def __call__(self, loop: Loop) -> str | None:
        """Do it. A text is a reason to end the run (`stopped`)."""
        return None

    def end(self, loop: Loop) -> None:
        """Called once after the last step, whatever ended the run."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it has to remember in a checkpoint."""
        return {}, {}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go back to what `state` gave."""


def fit(
    denoiser: Denoiser,
    adapters: Mapping[str, Adapter],
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    differences: Mapping[str, Difference] | None = None,
    on_event: EventHandler,
    cancelled: Callable[[], bool],
    watchers: Sequence[Watcher] = (),
    start: RunState | None = None,
) -> Loop:
    """Train `adapters` in place.

    Whatever ends the loop, the adapters then hold on the CPU, in fp32, what is to be saved of the last good step, and
    the model is as it was.

    Args:
        denoiser: the model, patches included; they stay frozen.
        adapters: by module path, fp32.
        samples: the dataset.
        recipe: settings.
        differences: of norms and biases, trained along, by module path.
        on_event: receives a `StepDone` per step, late and in order, and what else happens.
        cancelled: asked between steps.
        watchers: called between steps, in order.
        start: where to go on.

    Returns:
        The loop at its end.

    Raises:
        TrainingError: the run went wrong more often than `recipe.max_rollbacks`, or memory is too small for one sample.
        LoraError: `start` belongs to other adapters.
    """
    loop = Loop(Engine(denoiser, adapters, recipe, differences), samples, on_event, cancelled, watchers)
    try:
        if start is not None:
            loop.load(start)
        loop.run()
    finally:
        loop.engine.release()
    return loop


class Loop:
    """A run, between two of its steps.

    Args:
        engine, samples, on_event, cancelled, watchers: as for `fit`.
        until: step behind which the run is cancelled; None for none.

    Attributes:
        engine: the weights and all that belongs to them.
        tell: receives events.
        step: updates taken, those that were left out included.
        losses: of each of them, NaN where it was left out.
        rollbacks: how often the run went back.
        reason: why it ended, `finished`, `cancelled` or `stopped`; empty while it goes on.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        on_event: EventHandler,
        cancelled: Callable[[], bool],
        watchers: Sequence[Watcher] = (),
        until: int | None = None,
    ) -> None:
        self.engine = engine
        self.tell = on_event
        self.step = 0
        self.losses: list[float] = []
        self.rollbacks = 0
        self.reason = ""
        self._samples = samples
        self._until = self.steps if until is None else min(until, self.steps)
        self._cancelled = cancelled
        self._watchers = watchers
        self._mailbox = Mailbox(engine.recipe.device)
        self._noise = NoiseScale()
        self._taken: dict[int, _Taken] = {}
        self._good: RunState | None = None
        self._begun = False
        self._torn = False
        self._eager = False

    @property
    def steps(self) -> int:
        """Updates that the run is planned to take."""
        return self.engine.recipe.steps

    def run(self) -> None:
        """Take the remaining steps."""
        self._good = self._good or self._snapshot()
        device = self.engine.recipe.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while not self.reason:
                    with self.engine.prepared(self._begin, self._planned):
                        waiting = self._segment()
                    for watcher in waiting:
                        self._call(watcher)
        finally:
            for watcher in self._watchers:
                watcher.end(self)

    @property
    def is_whole(self) -> bool:
        """Whether weights and losses belong to the same step; an exception can leave them apart."""
        return len(self.losses) == self.step and not self._torn

    def state(self) -> RunState:
        """Everything that the run needs to go on from here; tensors are copies on the CPU."""
        now, recipe = self._snapshot(), self.engine.recipe
        numbers: dict[str, Any] = {
            "engine": now.numbers,
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],
            "rollbacks": self.rollbacks,
            "stopped": self.reason == "stopped",
            "noise_scale": self._noise.to_json(),
            "micro_batch": recipe.micro_batch,
            "checkpoint_depth": recipe.checkpoint_depth,
            "eager": self._eager,
            "layout": self.engine.flat.layout,
        }
        parts = {"engine": now.tensors}
        if self._good is not None and self._good.step != self.step:
            parts["snapshot"] = self._good.tensors
            numbers["snapshot"] = {"step": self._good.step, "engine": self._good.numbers}
        for watcher in self._watchers:
            if watcher.name:
                parts[watcher.name], numbers[watcher.name] = watcher.state()
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        return RunState(self.step, tensors, numbers)

    def load(self, state: RunState) -> None:
        """Go to a state that `state` gave. Raises LoraError if it is one of other adapters."""
        numbers = state.numbers
        if numbers["layout"] != self.engine.flat.layout:
            raise LoraError("a checkpoint must hold the layers that are trained, and this one holds others; start anew")
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.step = state.step
        self.losses = [math.nan if loss is None else loss for loss in numbers["losses"]]
        self.rollbacks = numbers["rollbacks"]
        self.reason = "stopped" if numbers["stopped"] else ""  # nothing is left to do but to save what there is
        self._noise = NoiseScale.from_json(numbers["noise_scale"])
        self.engine.load(parts["engine"], numbers["engine"])
        self._change(micro_batch=numbers["micro_batch"])
        if self.engine.recipe.activations != "auto":  # which decides on it anew, as it changes no number
            self._change(checkpoint_depth=numbers["checkpoint_depth"])
        if numbers.get("eager"):
            self._stop_compiling()
        if "snapshot" in numbers:
            kept = numbers["snapshot"]
            self._good = RunState(kept["step"], parts["snapshot"], kept["engine"])
        for watcher in self._watchers:
            if watcher.name:
                watcher.load(parts[watcher.name], numbers[watcher.name])

    def _segment(self) -> list[Watcher]:
        """Steps until the model has to be left: at the end, for watchers that need it bare, or to begin anew.

        Returns the watchers that wait for the bare model.
        """
        recipe = self.engine.recipe
        maker = batch_maker(self.engine.denoiser, self._samples, recipe, self.engine.dropout)
        first = recipe.first_step
        memory = failure = ""
        with contextlib.closing(prefetched(maker, range(first + self.step, first + self._until))) as coming:
            while self.step < self._until and not self._cancelled():
                memory, failure = self._take(coming)
                if memory or failure:
                    break
                waiting = self._between()
                if waiting is None or waiting or self.reason:
                    return waiting or []
        if memory:  # now that nothing holds on to the activations any more
            self._shrink(memory)
        elif failure:
            self._go_on_without_compiling(failure)
        elif self._hear(wait=True):
            self.reason = "finished" if self.step == self.steps else "cancelled"
        return []

    def _take(self, coming: Iterator[tuple[int, list[Batch]]]) -> tuple[str, str]:
        """Take one step. The first text says that memory ran out, the second that compiled code failed.

        The step is then to be taken anew in smaller pieces, or without compiling.
        """
        batches = None
        try:
            # The next step's batch is put on the device beside this one's work, so memory may run out there as well.
            _, batches = next(coming)
            gradient = self.engine.gradient(batches)
        except Exception as error:
            if is_out_of_memory(error):
                return str(error), ""
            # What torch raises where it cannot compile is of any kind; if it was something else it comes again.
            if batches is None or not self.engine.recipe.compile or isinstance(error, LorasmithError):
                raise
            return "", reason(error)
        self._torn = True
        self._taken[self.step] = _Taken.of(batches)
        self._mailbox.post(self.step, self.engine.update(self.step, *gradient))
        self.step += 1
        self._torn = False
        return "", ""

    def _between(self) -> list[Watcher] | None:
        """What is due between two steps. Returns the watchers that wait for the bare model; None after going back."""
        if not self._hear():
            return None
        due = [watcher for watcher in self._watchers if watcher.due(self)]
        is_snapshot_due = self.step % _SNAPSHOT_STEPS == 0
        if (due or is_snapshot_due) and not self._hear(wait=True):
            return None
        if is_snapshot_due:
            self._good = self._snapshot()
        for watcher in due:
            if not watcher.bare:
                self._call(watcher)
        return [watcher for watcher in due if watcher.bare]

    def _call(self, watcher: Watcher) -> None:
        self.reason = watcher(self) or self.reason

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            for watcher in self._watchers:
                watcher.begin(self.engine)

    def _hear(self, *, wait: bool = False) -> bool:
        """Take in what the device has reported; False if a step went wrong and the loop went back."""
        for step, (sound, norm, first, *losses) in self._mailbox.collect(wait=wait):
            taken = self._taken.pop(step)
            self.losses.append(math.fsum(losses) / len(losses))
            if not sound or exploded(self.losses):
                self._go_back(step, taken, updated=bool(sound))
                return False
            if math.isfinite(norm):
                whole, small = len(losses), taken.first
                self._noise.update((first * whole / small) ** 2, norm**2, small=small, big=whole)
            self.tell(
                StepDone(
                    step=step + 1,
                    loss=self.losses[-1],
                    grad_norm=norm,
                    learning_rate=self.engine.recipe.learning_rate * self.engine.rate(step),
                    draws=tuple(zip(taken.indices, taken.quantiles, losses, strict=True)),
                    noise_scale=self._noise.value or 0.0,
                )
            )
        return True

    def _go_back(self, step: int, taken: _Taken, *, updated: bool) -> None:
        """Leave a step out and go on behind it, from the last snapshot before it, at half the rate.

        Args:
            step: counted from 0.
            taken: its samples.
            updated: whether it moved the weights: its numbers were finite, but its loss exploded.
        """
        loss = self.losses.pop()
        good = self._good
        assert good is not None  # there is one before the first step
        images = tuple(dict.fromkeys(taken.names))
        what = f"the loss exploded to {loss:.3g}" if updated else "loss and gradient must stay finite but did not"
        trouble = f"{what} at step {step + 1} (images: {', '.join(images)})"
        self._mailbox = Mailbox(self.engine.recipe.device)
        self._taken.clear()
        fruitless = step + 1 == self.steps and not any(map(math.isfinite, self.losses))
        if self.rollbacks == self.engine.recipe.max_rollbacks or fruitless:
            self._give_up(step, good if updated else None, trouble)
        factor = self.engine.rate_factor / 2
        self.engine.load(good.tensors, good.numbers)
        self.engine.rate_factor = factor
        self.losses.append(math.nan)
        self.step = step + 1
        self.rollbacks += 1
        self.tell(
            RolledBack(
                step=step + 1,
                to_step=good.step,
                images=images,
                rate_factor=factor,
                message=f"{trouble}; that step is left out, and training goes on from step {good.step} at {factor:g} "
                "times the learning rate.",
            )
        )

    def _give_up(self, step: int, good: RunState | None, trouble: str) -> None:
        """End the run with the state before a step, or with an earlier one. Raises TrainingError."""
        self.step = step
        kept = "the LoRA as it was before that step is kept"  # for its update was never made
        if good is not None:
            self.engine.load(good.tensors, good.numbers)
            self.step = good.step
            kept = f"the LoRA of step {good.step} is kept"
        self.losses = self.losses[: self.step]
        times = f", after {self.rollbacks} times before in this run" if self.rollbacks else ""
        recipe = self.engine.recipe
        raise TrainingError(
            f"{trouble}{times}; {kept}; try a learning rate below {recipe.learning_rate:g}"
            + (", or training_dtype fp32" if recipe.dtype != torch.float32 else "")
        )

    def _shrink(self, trouble: str) -> None:
        """Take smaller pieces of a step from now on, and in the end compute activations twice."""
        recipe = self.engine.recipe
        pieces = recipe.micro_batch or recipe.batch_size
        if pieces > 1:
            self._change(micro_batch=-(-pieces // 2))
        elif recipe.checkpoint_depth != 1:  # whole blocks take the least
            self._change(checkpoint_depth=1)
        else:
            raise TrainingError(
                f"memory must hold one image's forward and backward pass, and did not at step {self.step + 1} with "
                f"gradient checkpointing ({trouble.splitlines()[0]}); use smaller pictures or a lower rank, or "
                "quantization"
            )
        gc.collect()
        if recipe.device.type == "cuda":
            torch.cuda.empty_cache()
        recipe = self.engine.recipe
        pieces = recipe.micro_batch or recipe.batch_size
        how = f"{pieces} at a time"
        if recipe.checkpoint_depth:
            how += ", with gradient checkpointing"
        self.tell(
            Shrunk(
                step=self.step + 1,
                micro_batch=pieces,
                checkpoint_depth=recipe.checkpoint_depth,
                message=f"Memory ran out at step {self.step + 1}: it is taken again with the same images, {how}.",
            )
        )

    def _planned(self) -> Recipe:
        """The recipe, with activations as memory has room for them."""
        recipe = self.engine.recipe
        if recipe.activations == "auto":
            try:
                plan = plan_for(self.engine, self._samples)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._change(activations="keep", checkpoint_depth=1)  # the step itself finds out about smaller pieces
                self.tell(Warned(message="Memory ran out while activations were measured: blocks are computed again."))
                return self.engine.recipe
            self._change(activations=plan.activations, checkpoint_depth=plan.checkpoint_depth)
            self.tell(Planned(**asdict(plan), message=str(plan)))
        return self.engine.recipe

    def _go_on_without_compiling(self, failure: str) -> None:
        self._stop_compiling()
        self.tell(
            Warned(
                message=f"Blocks cannot be compiled here ({failure}): step {self.step + 1} is taken again, and the "
                "run goes on, without compile."
            )
        )

    def _stop_compiling(self) -> None:
        self._eager = True
        self._change(compile=False)

    def _change(self, **settings: Any) -> None:
        self.engine.recipe = replace(self.engine.recipe, **settings)

    def _snapshot(self) -> RunState:
        return RunState(self.step, *self.engine.state())


@dataclass(frozen=True)
class _Taken:
    """What is remembered of a step whose numbers are still on their way: no tensors.

    Attributes:
        names, indices, quantiles: of its samples.
        first: samples of its first batch.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    quantiles: tuple[float, ...]
    first: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> _Taken:
        return cls(
            tuple(name for batch in batches for name in batch.names),
            tuple(index for batch in batches for index in batch.indices),
            tuple(quantile for batch in batches for quantile in batch.quantiles),
            len(batches[0].names),
        )
