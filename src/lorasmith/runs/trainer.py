"""`Trainer`: the training loop as an object that is stepped by hand, with the numbers of a run of the same settings."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self

import torch
from torch import Tensor, nn

from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import DataError, OptionError, TrainingError
from lorasmith.core.options import options_of
from lorasmith.core.placement import chosen_device
from lorasmith.core.printable import described
from lorasmith.data.dataset import EncodedDataset, split
from lorasmith.diffusion.loss_functions import Loss
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.runs.library import Trained
from lorasmith.runs.library_inputs import samples_of, taken, trainable_of, with_settings
from lorasmith.runs.progress_bars import note
from lorasmith.training.batches import Batch, captions_ready, prefetched
from lorasmith.training.config import TrainConfig, config_over
from lorasmith.training.engine import Engine, batch_maker, prediction_of
from lorasmith.training.gradient_starts import start_adapters
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.loop import Loop
from lorasmith.training.lora_handle import Lora
from lorasmith.training.memory.spilling import memory_capped
from lorasmith.training.methods.all_methods import other_texts
from lorasmith.training.notes import ReportNote
from lorasmith.training.recovery import RunState
from lorasmith.training.results import BaseHashes, lora_of, training_metadata
from lorasmith.training.storage.run_states import load_state, save_state
from lorasmith.training.watcher_settings import WatcherSettings

P = ParamSpec("P")


@dataclass(frozen=True)
class StepResult:
    """What an update did."""

    loss: float  # mean over the samples of the step
    grad_norm: float  # of the whole gradient, before clipping


@dataclass(frozen=True, kw_only=True)
class TrainerArguments(TrainConfig):
    """Keyword arguments of `Trainer`: every setting of `TrainConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        loss: as for `train`.
        device: where to train; the first GPU, or the CPU, if None.
        progress: write the run's notes on standard error, and warn of settings without effect; False does neither, and
            `Trainer.job.notes` has them.
    """

    config: TrainConfig | None = None
    loss: str | Loss | None = None
    device: str | torch.device | None = None
    progress: bool = True


def _trains(
    arguments: Callable[P, TrainConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Trainer, Trained, object, P], None]]:
    """Decorator: `**arguments` get the signature of their dataclass, for type checkers and `help`."""
    return lambda function: with_settings(function, arguments)


class TrainStep:
    """One step of a `Trainer`: its batches, then its gradient, then its update.

    Attributes:
        number: steps taken before it.
        batches: its samples with their noise, one batch per forward pass (micro-batches, and sizes that do not fit
            into one batch, are several).
    """

    def __init__(self, trainer: Trainer, number: int, batches: Sequence[Batch]) -> None:
        self.number = number
        self.batches = tuple(batches)
        self.result: StepResult | None = None  # None before the update
        self._trainer = trainer
        self._losses: Tensor | None
        trainer._current = self
        self.reset()

    def __repr__(self) -> str:
        samples = sum(len(batch.names) for batch in self.batches)
        return f"TrainStep({self.number}: {samples} samples{f', {self.result}' if self.result else ''})"

    def reset(self) -> None:
        """Forget the gradient, so that the next one is that of the weights as `Trainer.weights` has them now."""
        self._losses, self._first = None, torch.zeros(())
        self._trainer.engine.flat.publish()  # weights may have been written to
        self._trainer.engine.flat.zero()

    def gradient(self) -> Tensor:
        """Compute the step's gradient, into `Trainer.gradients`; returns the loss of each sample, (samples,) fp32.

        Called again, it returns the same, unless `reset` was called. Raises OptionError outside of the trainer's loop,
        and torch's error if memory runs out.
        """
        if self._losses is None:
            self._check_current()
            engine = self._trainer.engine
            self._losses, self._first = engine.summed(self.batches, engine.gradient(self.batches))
        return self._losses

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of losses of your own, instead of `gradient`.

        Args:
            losses: (samples of a batch,), made from `Trainer.predict` of one of `batches`; the step's gradient is that
                of the mean over all its samples.
        """
        self._check_current()
        engine, sizes = self._trainer.engine, {len(batch.names) for batch in self.batches}
        if not isinstance(losses, Tensor) or losses.ndim != 1 or len(losses) not in sizes or not losses.requires_grad:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else described(losses)
            raise OptionError(
                f"backward needs the loss of each sample of a batch, ({' or '.join(map(str, sorted(sizes)))},) with a "
                f"gradient, got {got}; average over everything but the first dimension"
            )
        torch.autograd.backward(
            losses.float().sum() * (engine.loss_scale / sum(len(batch.names) for batch in self.batches))
        )
        engine.flat.collect()
        own = losses.detach().float()
        self._losses = own if self._losses is None else torch.cat((self._losses, own))

    def update(self) -> StepResult:
        """Update the weights with the gradient, which is computed first if it was not; returns loss and norm.

        Raises:
            OptionError: the step is over, as the trainer has loaded a state, or another loop over it has begun.
            TrainingError: a loss or the gradient is not finite; the weights are as before.
        """
        if self.result is None:
            self._check_current()
            losses = self.gradient()
            self.result = self._trainer._update(self.number, losses, self._first.to(losses.device))
        return self.result

    def skip(self) -> None:
        """Leave the weights as they are in this step, which counts; its loss is recorded as NaN."""
        if self.result is None:
            self._check_current()
            self.result = StepResult(math.nan, math.nan)
            self._trainer._loop.record(math.nan)

    def _check_current(self) -> None:
        self._trainer._check_open()
        if self._trainer._current is not self:
            raise OptionError(
                f"step {self.number + 1} is over, as a state was loaded or another loop over its Trainer has begun; "
                "use one loop, and its newest step"
            )


class Trainer:
    """The training loop in your hands: a run that is taken step by step.

        trainer = ls.Trainer(model, data, steps=100, rank=8)
        for step in trainer:
            losses = step.gradient()  # (samples,); optional, as is `update`: what was not called is done afterwards
            result = step.update()
        trainer.lora.save("dog.safetensors")

    Losses and weights are bit for bit those of `ls.train` with the same settings, as long as you change nothing. What
    surrounds a run is left to you: validation (on `held_out`), previews, rollbacks after a diverging step, smaller
    batches when memory runs out, run folder and report; their settings have no effect, of which a Python warning is
    given. While it is iterated, and inside of `with trainer:`, the model is frozen on its device with the adapters
    attached; before and afterwards it is as it was.

    `help(lorasmith.Trainer.__init__)` lists its settings.

    Attributes:
        job: the planned run: resolved settings (`job.config`), adapters by layer, notes.
        engine: adapters, optimizer and what belongs to them; `engine.rate_factor` multiplies the learning rate.
        model: the frozen model.
        held_out: the samples that `train` would judge the run by, which are not trained on; None if there are none.
    """

    @_trains(TrainerArguments)
    def __init__(self, model: Trained, data: object, **arguments: Any) -> None:
        """Plan the run.

        Args:
            model: the base model, with or without LoRAs applied, or a `Trainable`; anything that `train` takes.
            data: encoded samples: an `EncodedDataset` or a list of `Sample`s.
            **arguments: below.

        Raises:
            OptionError: a setting is unknown, out of range or does not fit the model, or there is no such device.
            LoraError: an existing LoRA cannot be read or is for another model.
            ModelError: the model cannot be loaded, or is none.
            DataError: the samples do not fit the model, or are none.
        """
        own, settings = taken(TrainerArguments, "Trainer", arguments)
        self.model = trainable_of(model)
        samples = samples_of(data, _only_samples)
        config = config_over(own.config, {**settings, "loss": own.loss})
        idle = [name for name in _IDLE if getattr(config, name) and not config.is_default(name)]
        if idle and own.progress:
            warnings.warn(f"no effect on a Trainer, which leaves this to you: {', '.join(idle)}", stacklevel=2)
        job = plan_job(self.model, config, chosen_device(own.device))
        job.model.check(samples.samples)
        parts = split(samples, share=job.config.validation_share)
        self._data, self.held_out = parts.training, parts.held_out
        self.job: TrainJob = job.for_samples(self._data.samples)
        self.engine: Engine = engine_of(self.job)
        self._loop = Loop(self.engine, self._data)
        self._started = time.time()
        self._open = contextlib.ExitStack()
        self._depth = 0
        self._current: TrainStep | None = None
        for sentence in self.job.notes if own.progress else ():
            if not isinstance(sentence, ReportNote):
                note(sentence)
        if self.job.config.existing_state is not None:
            self.load_state(self.job.config.existing_state)

    def __repr__(self) -> str:
        return f"Trainer({self.model.title}: step {self.step} of {self._loop.steps}, {self.job.summary})"

    @property
    def step(self) -> int:
        """Updates taken."""
        return self._loop.step

    @property
    def learning_rate(self) -> float:
        """That of the next step, as the schedule and `engine.rate_factor` make it."""
        return self.engine.learning_rate_at(self.step)

    @property
    def losses(self) -> list[float]:
        """Mean loss of each step taken."""
        return self._loop.losses

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name: `layer.down`, `layer.up` and the like, in the dtype of the run."""
        return self.engine.flat.parameters

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Views of them in fp32, which the optimizer updates; what is written into them counts from the next step."""
        return {name: self.engine.flat.view(self.engine.flat.master, name) for name in self.parameters}

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """Views of the gradients in fp32; write into them between `TrainStep.gradient` and `TrainStep.update`."""
        return {name: self.engine.flat.view(self.engine.flat.grad, name) for name in self.parameters}

    @property
    def lora(self) -> Lora:
        """The LoRA of the steps taken, a copy: with `ema_decay` the average, as `ls.train` saves it."""
        steps = self.job.steps_before + self.step
        metadata = training_metadata(
            self.job,
            self._data,
            title=self.model.title,
            trigger=None,
            steps=steps,
            started=self._started,
            record=None,
            hashes=BaseHashes(None),
        )
        with self.engine.exported():
            return lora_of(self.job, metadata)

    def __enter__(self) -> Self:
        if not self._depth:
            device = self.engine.way.device
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext())
                stack.enter_context(memory_capped(device, self.engine.way.memory_cap))
                stack.enter_context(
                    captions_ready(
                        self._data,
                        self.job.draws,
                        seed=self.job.config.seed,
                        on_event=lambda event: None,
                        progress=lambda done, total: None,
                        others=other_texts(self._data, self.job.config),
                        model=self.job.model,
                    )
                )
                stack.enter_context(self._loop.frozen())
                start_adapters(self.engine, self._data)
                stack.enter_context(self.engine.attached())
                self._open = stack.pop_all()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._open.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[TrainStep]:
        """The remaining steps. Calls of a step that the caller skips are made before the next step.

        After a state was loaded in the loop, the next step is that of the state.
        """
        engine, first = self.engine, self.engine.steps_before
        with self:
            maker = batch_maker(engine.model, self._data, engine.config, engine.way, engine.rank_masks)
            while self.step < self._loop.steps:
                ahead = range(first + self.step, first + self._loop.steps)
                with contextlib.closing(prefetched(maker, ahead)) as coming:
                    for number, batches in coming:
                        step = TrainStep(self, number - first, batches)
                        yield step
                        if self._current is None:  # a state was loaded
                            break
                        step.update()

    def predict(self, batch: Batch) -> Tensor:
        """The model's prediction for a batch of a step, (batch, channels, [frames,] height, width), differentiable.

        Raises OptionError outside of the loop, and with dropout of ranks or T-LoRA, which `TrainStep.gradient` applies.
        """
        self._check_open()
        config = self.job.config
        if config.rank_dropout or config.module_dropout or config.rank_schedule:
            raise OptionError(
                "predict applies no rank_dropout, module_dropout or tlora; leave them out, or use gradient()"
            )
        return prediction_of(self.engine.model, batch, self.engine.way)

    def target(self, batch: Batch) -> Tensor:
        """What `predict` is trained to return for a batch: its noise, velocity or flow, fp32."""
        kind = PARAMETERIZATIONS[self.model.diffusion.parameterization]
        return kind.target(batch.clean, batch.noise, batch.level)

    def state(self) -> RunState:
        """Everything that is needed to go on from here bit for bit: step, tensors (copies on the CPU) and numbers."""
        return self._loop.state()

    @typed_arguments
    def load(self, state: RunState) -> None:
        """Go back, or on, to a state of a trainer of the same settings; the loop continues from there.

        Raises:
            LoraError, TrainingError: it is of other layers or settings.
        """
        self._loop.load(state)
        self._current = None

    @typed_arguments
    def save_state(self, path: str | os.PathLike[str]) -> Path:
        """Write the state to a file, which `existing_state` of a later run takes as well. Raises OutputError."""
        save_state(Path(path), self.state())
        return Path(path)

    @typed_arguments
    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Load a state from a file, such as one in the folder of a run. Raises OutputError, and as `load`."""
        self.load(load_state(Path(path)))

    def _check_open(self) -> None:
        if not self._depth:
            raise OptionError(
                "the model is ready for steps in the trainer's loop alone, which has ended; iterate it, or use it in "
                "`with trainer:`"
            )

    def _update(self, number: int, losses: Tensor, first: Tensor) -> StepResult:
        each = losses.tolist()  # waits for a GPU here, so that Ctrl-C comes before the update, not before its count
        sound, norm, *_ = self.engine.update(number, losses, first).tolist()
        if not sound:
            self.engine.allow_updates()
            raise TrainingError(
                f"losses and gradients must be finite, but those of step {number + 1} are not, and the weights are as "
                "before; lower the learning rate, or leave the step out with skip()"
            )
        result = StepResult(math.fsum(each) / len(each), norm)
        self._loop.record(result.loss)
        return result


_IDLE = dict.fromkeys(name for name in options_of(WatcherSettings) if name != "validation_share")
"""Settings of what surrounds the steps of a run."""


def _only_samples(value: object) -> EncodedDataset:
    raise DataError(
        f"a Trainer needs encoded samples, got {described(value)}; encode them first: "
        "lorasmith.load_dataset(pictures, model)"
    )
