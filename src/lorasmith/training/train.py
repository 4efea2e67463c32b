"""Train a LoRA: from a model, encoded samples and a configuration to a LoRA that can be saved.

This is the one way in for command line, nodes and library. What is decided before the first step is in `job`, the loop
itself in `engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.dtypes import dtype_from_name, dtype_name
from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import write_atomic
from lorasmith.core.options import config_from
from lorasmith.core.placement import best_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Recipe, fit
from lorasmith.training.events import Event, EventHandler, RunFinished, RunStarted, StepDone, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.lora import Lora
from lorasmith.training.records import run_record, training_metadata
from lorasmith.training.run_folder import RunFolder

__all__ = ["Job", "TrainResult", "plan_job", "recipe_of", "run_job", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        lora: the LoRA as it stands after the last good step.
        losses: loss of each step taken.
        steps: steps in all, those of the LoRA that was continued included.
        reason: `finished`, `cancelled` or `failed`.
        folder: the run's folder, if one was asked for.
        path: the LoRA in it.
    """

    lora: Lora
    losses: list[float]
    steps: int
    reason: str = "finished"
    folder: Path | None = None
    path: Path | None = None

    def plot(self, path: str | Path) -> Path:
        """Draw the loss curve as a PNG."""
        from lorasmith.report.loss_plot import plot_losses

        target = Path(path)
        write_atomic(target, plot_losses(self.losses))
        return target


def train(
    model: Model | Denoiser,
    data: EncodedDataset,
    *,
    config: TrainConfig | None = None,
    output: str | Path | None = None,
    title: str = "lora",
    trigger: str | None = None,
    device: str | torch.device | None = None,
    on_event: EventHandler | None = None,
    cancelled: Callable[[], bool] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a LoRA.

    Args:
        model: the base model, with or without LoRAs applied; it is left exactly as it was.
        data: encoded samples.
        config: all settings; `settings` are laid over it.
        output: folder of the run, or None to write nothing.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        device: where to train; the first GPU, or the CPU, if None.
        on_event: receives typed events.
        cancelled: asked between steps; True ends the run with what there is.
        **settings: fields of `TrainConfig`.

    Raises:
        LorasmithError: the settings, the data or an existing LoRA do not fit, or the loss became non-finite. If some
            steps were taken and there is an output folder, their LoRA is in it and the message says where.
    """
    config = config_from(TrainConfig, {**(asdict(config) if config else {}), **settings})
    job = plan_job(model if isinstance(model, Denoiser) else model.denoiser, config, device)
    return run_job(
        job, data, output=output, title=title, trigger=trigger, device=device, on_event=on_event, cancelled=cancelled
    )


def run_job(
    job: Job,
    data: EncodedDataset,
    *,
    output: str | Path | None = None,
    title: str = "lora",
    trigger: str | None = None,
    device: str | torch.device | None = None,
    on_event: EventHandler | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train what `plan_job` decided on; a job is run once. Arguments and errors as for `train`."""
    run = _Run(job, data, title=title, trigger=trigger, device=torch.device(device or best_device()))
    return run(
        folder=None if output is None else Path(output),
        on_event=on_event or (lambda event: None),
        cancelled=cancelled or (lambda: False),
    )


def recipe_of(job: Job, device: torch.device) -> Recipe:
    """What the engine needs to know of a planned run."""
    config = job.config
    assert config.learning_rate is not None and config.timesteps is not None  # decided by plan_job
    own = next(job.denoiser.module.parameters()).dtype
    return Recipe(
        steps=config.steps,
        first_step=job.steps_before,
        batch_size=config.batch_size,
        accumulation=config.grad_accumulation_steps,
        learning_rate=config.learning_rate,
        learning_rates=job.learning_rates,
        lora_plus_ratio=config.lora_plus_ratio,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_function=config.loss_function,
        objective=config.objective,
        timesteps=config.timesteps,
        timestep_shift=config.timestep_shift,
        stratified=config.stratified,
        loss_weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        noise_offset=config.noise_offset,
        zero_terminal_snr=config.zero_terminal_snr,
        seed=config.seed,
        dtype=own if config.training_dtype == "none" else dtype_from_name(config.training_dtype),
        device=device,
        checkpoint_depth=config.checkpoint_depth if config.gradient_checkpointing else 0,
    )


class _Run:
    """One run: training, then the LoRA with its metadata, then the records, whatever ended it."""

    def __init__(
        self, job: Job, data: EncodedDataset, *, title: str, trigger: str | None, device: torch.device
    ) -> None:
        self._job = job
        self._data = data
        self._title = title
        self._trigger = trigger
        self._recipe = recipe_of(job, device)
        self._losses: list[float] = []
        self._started = time.time()

    def __call__(self, *, folder: Path | None, on_event: EventHandler, cancelled: Callable[[], bool]) -> TrainResult:
        records = None if folder is None else RunFolder(folder, run_record(self._job, self._data, self._title))

        def tell(event: Event) -> None:
            if isinstance(event, StepDone):
                self._losses.append(event.loss)
            if records is not None:
                records(event)
            on_event(event)

        reason = "failed"
        try:
            self._announce(tell)
            fit(
                self._job.denoiser,
                self._job.adapters,
                self._data.samples,
                self._recipe,
                differences=self._job.differences,
                on_event=tell,
                cancelled=cancelled,
            )
            reason = "finished" if len(self._losses) == self._recipe.steps else "cancelled"
        except BaseException as error:
            # Whatever ended the run, the steps that were taken are worth keeping; the error then goes on its way.
            if self._losses and folder is not None:
                kept = self._saved(self._result(reason), folder)
                where = f"; the LoRA of {len(self._losses)} steps is at {kept.path}"
                if isinstance(error, LorasmithError):
                    raise type(error)(f"{error}{where}") from error
                error.add_note(where.removeprefix("; "))
            raise
        finally:
            if records is not None:
                records(RunFinished(step=len(self._losses), reason=reason))
                records.close()
        result = self._result(reason)
        on_event(RunFinished(step=len(self._losses), reason=reason))
        return result if folder is None else self._saved(result, folder)

    def _announce(self, tell: EventHandler) -> None:
        job = self._job
        tell(
            RunStarted(
                steps=self._recipe.steps,
                steps_before=job.steps_before,
                samples=len(self._data),
                adapters=len(job.adapters),
                parameters=job.parameters,
                device=str(self._recipe.device),
                dtype=dtype_name(self._recipe.dtype),
            )
        )
        for note in job.notes:
            tell(Warned(message=note))

    def _result(self, reason: str) -> TrainResult:
        job = self._job
        steps = job.steps_before + len(self._losses)
        trained = {ModuleRef(DENOISER, path): adapter.to_weights() for path, adapter in job.adapters.items()}
        differences = {ref: dict(changes) for ref, changes in job.carried.differences.items()}
        for path, one in job.differences.items():
            differences.setdefault(ModuleRef(DENOISER, path), {}).update(one.to_tensors())
        for ref in [ref for ref, weights in trained.items() if weights.algorithm == "full"]:
            differences.setdefault(ref, {})["weight"] = trained.pop(ref).tensors["diff"]  # what files call it
        metadata = training_metadata(
            job, self._data, title=self._title, trigger=self._trigger, steps=steps, started=self._started
        )
        state = AdapterState(
            adapters={**job.carried.adapters, **trained},
            differences=differences,
            unknown=job.carried.unknown,
            metadata=metadata,
        )
        lora = Lora(state, job.denoiser.base.names, dtype_from_name(job.config.lora_dtype))
        return TrainResult(lora, self._losses, steps, reason)

    def _saved(self, result: TrainResult, folder: Path) -> TrainResult:
        path = result.lora.save(folder / f"{self._title}.safetensors")
        if result.losses:
            result.plot(folder / "loss.png")
        return replace(result, folder=folder, path=path)
