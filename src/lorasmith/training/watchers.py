"""Watchers for validation, effect, LoRA files and previews; the one for run states is in `runs.run_states`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lorasmith.core.effect import LEAST_EFFECT, idle_change
from lorasmith.core.errors import LorasmithError, TrainingError
from lorasmith.core.processes import Processes
from lorasmith.core.typed_json import typed
from lorasmith.data.dataset import Sample
from lorasmith.training.config import ResolvedConfig, TrainConfig
from lorasmith.training.early_stopping import LikenessHistory
from lorasmith.training.engine import Engine
from lorasmith.training.events import Event, LikenessMeasured, LoraSaved, Warned
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.optim.optimizers import check_alike
from lorasmith.training.trainable import Trainable
from lorasmith.training.validation import History, Validator
from lorasmith.training.way import Way

_VALIDATIONS = 10  # in a run, and previews by which it is stopped

_FIRST_PREVIEW = 30  # steps: half a minute, where one takes a second
_PREVIEWS = (0.05, 0.25, 0.5, 0.75)  # shares of a run


def preview_steps(config: TrainConfig) -> Sequence[int]:
    """The steps after which previews are drawn on the way, ascending."""
    if config.preview_every:
        return range(config.preview_every, config.steps, config.preview_every)
    shares = {max(1, int(share * config.steps)) for share in _PREVIEWS}
    return tuple(sorted(step for step in {min(_FIRST_PREVIEW, *shares), *shares} if step < config.steps))


def likeness_steps(config: TrainConfig) -> Sequence[int]:
    """The same where previews stop the run."""
    every = config.preview_every or max(1, config.steps // _VALIDATIONS)
    return range(every, config.steps, every)


class ValidationWatch(Watcher):
    """Evaluates the held-out images, keeps the best weights, and stops early; `on_best` is called for each new best."""

    name = "validation"

    def __init__(
        self,
        model: Trainable,
        samples: Sequence[Sample],
        config: ResolvedConfig,
        way: Way,
        on_best: Callable[[Loop], None] = lambda loop: None,
    ) -> None:
        # All validations, None before the first step.
        self.history: History | None = None
        # Flat fp32 buffer of the best weights, on the CPU.
        self.best: Tensor | None = None
        self._every = config.validate_every or max(1, config.steps // _VALIDATIONS)
        self._patience = 0 if config.stops_by_likeness else config.stop_patience
        self._on_best = on_best
        self._losses = Validator(
            model,
            samples,
            draws=config.validation_draws,
            batch_size=max(config.batch_size, 4),
            device=way.device,
            dtype=way.dtype,
            processes=way.processes,
            equal_passes=way.sharding,
            noise_range=config.noise_range,
        )

    @property
    def best_step(self) -> int | None:
        """Step of the best weights, None before the first validation."""
        return self.history.best_step if self.history is not None and self.history.steps else None

    def begin(self, engine: Engine) -> None:
        if self.best is not None:
            check_alike(self.best, engine.flat.master)
        if self.history is None:
            self.history = History(self._losses().tolist())

    def due(self, loop: Loop) -> bool:
        return loop.step % self._every == 0 or loop.step == loop.steps

    def __call__(self, loop: Loop) -> None:
        assert self.history is not None
        with loop.engine.evaluation_weights() as weights:
            try:
                losses = self._losses(loop.engine.rank_masks)
            except TrainingError as error:  # broken weights: the next step will diverge, and the loop roll back
                loop.emit(Warned(message=f"No validation at step {loop.step}: {error}."))
                return
            validated = self.history.add(loop.step, losses.tolist())
            if validated.best:
                self.best = weights.to("cpu", copy=True)
        if validated.best:
            _warned(loop, "The best LoRA so far is not saved yet", lambda: self._on_best(loop))
        loop.emit(validated)
        if self.history.should_stop(self._patience):
            loop.stop()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.history is None:
            return {}, {}
        # As tensors: many images and validations would exceed the size of a header.
        tensors = {"base": torch.from_numpy(self.history.base_table)}
        if self.history.tables:
            tensors["tables"] = torch.from_numpy(np.stack(self.history.tables))
        if self.best is not None:
            tensors["best"] = self.best
        return tensors, {"steps": list(self.history.steps)}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.best = tensors.get("best")
        if "base" in tensors:
            steps = typed(numbers["steps"], list[int])
            shape = self._losses.quantiles.shape
            shapes = {"base": shape, "tables": (len(steps), *shape)}
            if any(tensors[name].shape != wanted for name, wanted in shapes.items() if name in tensors):
                raise ValueError(f"validations must have losses for {shape[0]} images at {shape[1]} noise levels")
            tables = tensors["tables"].tolist() if "tables" in tensors else []
            self.history = History.of(tensors["base"].tolist(), zip(steps, tables, strict=True))


class LoraWatch(Watcher):
    """Saves the LoRA every `every` steps to a permanent file."""

    def __init__(self, save: Callable[[Loop, Path], None], path: Callable[[int], Path], *, every: int) -> None:
        self._save, self._path, self._every = save, path, every

    def due(self, loop: Loop) -> bool:
        return loop.step % self._every == 0 and loop.step < loop.steps  # the last one is the result

    def __call__(self, loop: Loop) -> None:
        def write() -> None:
            path = self._path(loop.step)
            with loop.engine.exported():
                self._save(loop, path)
            loop.emit(LoraSaved(step=loop.step, path=str(path)))

        _warned(loop, f"The LoRA of step {loop.step} is not saved", write)


class AverageWatch(Watcher):
    """Saves the averages over training `count` times in a run, at equal distances, the last at its end."""

    def __init__(self, save: Callable[[Loop, Sequence[int]], None], *, count: int, steps: int) -> None:
        self._save = save
        self._steps = sorted({max(1, round(steps * number / count)) for number in range(1, count + 1)})

    def due(self, loop: Loop) -> bool:
        return loop.step in self._steps

    def __call__(self, loop: Loop) -> None:
        _warned(loop, f"The averages of step {loop.step} are not saved", lambda: self._save(loop, self._steps))


class EffectWatch(Watcher):
    """Names a LoRA without effect: at its end, and a quarter into the run if the rates ahead will not change that.

    Sharded weights, whose reading takes all processes, are not compared.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self._config = config
        self._early = max(1, config.steps // 4)

    def due(self, loop: Loop) -> bool:
        return loop.step in (self._early, loop.steps) and not loop.engine.way.sharding

    def __call__(self, loop: Loop) -> None:
        with loop.engine.exported():
            largest = idle_change(loop.engine.relative_changes())
        rates = [self._config.scheduled(step) for step in range(loop.steps)]
        so_far = math.fsum(rates[: loop.step])
        # The change of a matrix that starts at zero is proportional to the sum of the rates.
        if largest is None or not so_far or largest * math.fsum(rates) / so_far >= LEAST_EFFECT:
            return
        is_end = loop.step == loop.steps
        what = "The LoRA does nothing" if is_end else f"The LoRA does next to nothing after {loop.step:,} steps"
        remedy = "train for more steps or" if is_end else "stop, and train"
        loop.emit(
            Warned(
                message=f"{what}: it changes no weight by more than {largest:.1g} of its size, and pictures show "
                f"changes from about {LEAST_EFFECT:g} on; {remedy} at a learning rate above "
                f"{self._config.learning_rate:g}."
            )
            if largest
            else Warned(
                message=f"{what}: it changes no weight, as no gradient reached one; look at masks, weights of images, "
                "learning rate and targets."
            )
        )


class Draw(Protocol):
    """Draws previews of the LoRA saved at `lora` after `step` updates; yields the events to emit, each as soon as there
    is what it reports.

    If it is `in_place`, those on the way are drawn with the frozen model as the run has it, others with the bare one.
    """

    in_place: bool

    @property
    def steps(self) -> Collection[int]:
        """The steps before the end after which it is called."""
        ...

    def has_drawn(self, step: int) -> bool:
        """Whether the pictures of a step are there."""
        ...

    def draw_base(self, step: int) -> Generator[Event]:
        """Draw the model without the LoRA, before the first step; `step` are the updates that a state brought."""
        ...

    def __call__(self, step: int, lora: Path, *, final: bool) -> Generator[Event]: ...


class PreviewWatch(Watcher):
    """Draws previews from the LoRA as it would be saved, in a temporary file at `path`."""

    needs_frozen_model = True
    is_resumed = False  # whether the run continues a killed or stopped one

    def __init__(self, draw: Draw, save: Callable[[Loop, Path], None], path: Path) -> None:
        self.needs_bare_model = not draw.in_place
        self._draw = draw
        self._save = save
        self._path = path

    def due(self, loop: Loop) -> bool:
        return loop.step in self._draw.steps  # the last preview uses the final file

    def missed(self, loop: Loop) -> bool:
        return self.is_resumed and self.due(loop) and not self._draw.has_drawn(loop.step)

    def __call__(self, loop: Loop) -> None:
        self.drawn(loop)

    def drawn(self, loop: Loop) -> list[Event]:
        """Draw and report; returns the events, none if the LoRA could not be saved."""
        events: list[Event] = []

        def draw() -> None:
            with contextlib.closing(self._drawn(loop)) as drawn:
                for event in drawn:
                    loop.emit(event)
                    events.append(event)

        _warned(loop, f"No preview at step {loop.step}", draw)
        return events

    def _drawn(self, loop: Loop) -> Generator[Event]:
        try:
            with loop.engine.exported():
                self._save(loop, self._path)
            yield from self._draw(loop.step, self._path, final=False)
        finally:
            self._path.unlink(missing_ok=True)


class LikenessWatch(Watcher):
    """Ends a run by the likeness of its previews, keeps the best weights, and calls `on_best` for each new best.

    Rank 0 draws, by `previews`, which is None elsewhere; all processes have the result.
    """

    name = "likeness"
    needs_frozen_model = True
    is_optional = True

    def __init__(
        self,
        previews: PreviewWatch | None,
        config: TrainConfig,
        processes: Processes,
        on_best: Callable[[Loop], None] = lambda loop: None,
    ) -> None:
        self.history = LikenessHistory()
        self.best: Tensor | None = None  # flat fp32 buffer of the best weights, on the CPU
        self._previews, self._processes, self._on_best = previews, processes, on_best
        self.needs_bare_model = previews is None or previews.needs_bare_model
        self._steps = likeness_steps(config)
        self._patience = config.stop_patience
        self._began = time.monotonic()

    def begin(self, engine: Engine) -> None:
        self._began = time.monotonic()

    @property
    def best_step(self) -> int | None:
        """Step of the best weights, None before the first preview."""
        return self.history.best_step if self.history.measured else None

    def due(self, loop: Loop) -> bool:
        return loop.step in self._steps

    def missed(self, loop: Loop) -> bool:
        return self.due(loop) and not self.history.is_at(loop.step)

    def __call__(self, loop: Loop) -> None:
        events = [] if self._previews is None else self._previews.drawn(loop)
        measured = self._processes.broadcast_from_rank0(
            lambda: next((event for event in events if isinstance(event, LikenessMeasured)), None)
        )
        if measured is None:  # a preview that failed, which was reported
            return
        self.history.add(measured)
        if self.history.best_step == loop.step:
            with loop.engine.evaluation_weights() as weights:
                self.best = weights.to("cpu", copy=True)
            _warned(loop, "The best LoRA so far is not saved yet", lambda: self._on_best(loop))
        if self.history.should_stop(self._patience):
            left = (loop.steps - loop.step) * (time.monotonic() - self._began) / max(1, len(loop.waited_s))
            saved = f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} seconds"
            message = f"{self.history.reason} It took {loop.step:,} of {loop.steps:,} steps, which saves about {saved}."
            loop.emit(Warned(message=message, is_remark=True))
            loop.stop()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {} if self.best is None else {"best": self.best}
        return tensors, {"measured": [asdict(likeness) for likeness in self.history.measured]}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.best = tensors.get("best")
        self.history = LikenessHistory(typed(numbers["measured"], list[LikenessMeasured]))


def _warned(loop: Loop, trouble: str, write: Callable[[], None]) -> None:
    """Call a function that writes files; an OutputError becomes a warning, as a full disk must not end the run."""
    try:
        write()
    except (LorasmithError, OSError) as error:
        loop.emit(Warned(message=f"{trouble}: {error}. Training continues."))
