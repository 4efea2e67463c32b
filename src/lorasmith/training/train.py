"""Train a LoRA: from a model, encoded samples and a configuration to a LoRA that can be saved.

This is the one way in for command line, nodes and library; the loop itself is in `engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.base import Adapter
from lorasmith.adapters.inject import Plan, create_adapters, load_adapters, plan_adapters
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.dtypes import dtype_from_name, dtype_name
from lorasmith.core.errors import LorasmithError, OptionError, TrainingError
from lorasmith.core.files import write_atomic
from lorasmith.core.options import config_from
from lorasmith.core.placement import best_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.base import Family, TargetPreset
from lorasmith.families.model import Denoiser, Model
from lorasmith.formats.metadata import steps_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Recipe, fit
from lorasmith.training.events import Event, EventHandler, RunFinished, RunStarted, StepDone, Warned
from lorasmith.training.lora import Lora
from lorasmith.training.records import run_record, training_metadata
from lorasmith.training.run_folder import RunFolder

__all__ = ["Job", "TrainResult", "plan_job", "recipe_of", "resolve_targets", "run_job", "train"]


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


@dataclass(frozen=True)
class Job:
    """A run with everything decided, before its first step.

    Attributes:
        config: with no setting left open.
        adapters: what will be trained, by module path.
        denoiser: what it is trained on, with the untrained differences of a continued LoRA folded in.
        carried: parts of a continued LoRA that are not trained and go into the result unchanged.
        steps_before: steps that the continued LoRA had.
        notes: sentences that the person should read.
    """

    config: TrainConfig
    adapters: dict[str, Adapter]
    denoiser: Denoiser
    carried: AdapterState = field(default_factory=AdapterState)
    steps_before: int = 0
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for adapter in self.adapters.values() for p in adapter.parameters())


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
    job = plan_job(model if isinstance(model, Denoiser) else model.denoiser, config)
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


def plan_job(denoiser: Denoiser, config: TrainConfig) -> Job:
    """Decide everything about a run that does not depend on the data. Raises OptionError and LoraError."""
    _refuse_unavailable(config)
    defaults = denoiser.base.defaults
    family = denoiser.base.family
    config = replace(
        config,
        learning_rate=config.learning_rate or defaults.learning_rate,
        alpha=float(config.rank) if config.alpha is None else config.alpha,
        targets=config.targets or defaults.targets,
        timesteps=config.timesteps or defaults.timestep_distribution,
    )
    plan = resolve_targets(denoiser, family, config)
    fresh = create_adapters(
        denoiser.module, plan, algorithm=config.algorithm, alpha=config.alpha, seed=config.seed, zero=config.zero_init
    )
    notes = _capped_note(plan)
    if config.existing_lora is None:
        return Job(config, fresh, denoiser, notes=notes)
    return _continued(config, Path(config.existing_lora), denoiser, fresh, notes)


def resolve_targets(denoiser: Denoiser, family: Family, config: TrainConfig) -> Plan:
    """The layers that `config.targets` names: a preset of the family, or patterns. Raises OptionError."""
    spec = config.targets or denoiser.base.defaults.targets
    preset = family.targets.get(spec.casefold())
    if preset is None:
        patterns = [pattern.strip() for pattern in spec.split(",") if pattern.strip()]
        exclude = tuple(pattern[1:] for pattern in patterns if pattern.startswith("!"))
        preset = TargetPreset(tuple(p for p in patterns if not p.startswith("!")) or ("*",), exclude)
    try:
        return plan_adapters(
            denoiser.module,
            include=preset.include,
            exclude=preset.exclude,
            linear_only=preset.linear_only,
            rank=config.rank,
        )
    except OptionError as error:
        raise OptionError(f"{error}; use one of {', '.join(family.targets)}, or patterns such as *.attn2.*") from None


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
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_function=config.loss_function,
        objective=config.objective,
        timesteps=config.timesteps,
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
        metadata = training_metadata(
            job, self._data, title=self._title, trigger=self._trigger, steps=steps, started=self._started
        )
        state = AdapterState(
            adapters={**job.carried.adapters, **trained},
            differences=job.carried.differences,
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


def _continued(
    config: TrainConfig, path: Path, denoiser: Denoiser, fresh: Mapping[str, Adapter], notes: tuple[str, ...]
) -> Job:
    """A job that goes on from an existing LoRA: its layers as they are, the other targets fresh."""
    existing = Lora.load(path, denoiser.base)
    held = {ref.path: one for ref, one in existing.state.adapters.items() if ref.component == DENOISER}
    adapters = load_adapters(denoiser.module, held)
    adapters.update({module: adapter for module, adapter in fresh.items() if module not in held})
    carried = replace(
        existing.state, adapters={ref: one for ref, one in existing.state.adapters.items() if ref.component != DENOISER}
    )
    differences = {ref.path: one for ref, one in carried.differences.items() if ref.component == DENOISER}
    if differences:
        denoiser = denoiser.patched(Patch({}, differences))
    before = steps_of(existing.state.metadata, path.name)
    note = (
        f"Going on from {path.name} ({before} steps): {len(held)} of its layers keep their rank and alpha, "
        f"{len(adapters) - len(held)} targets start fresh."
    )
    return Job(config, adapters, denoiser, carried, before, (note, *notes))


def _refuse_unavailable(config: TrainConfig) -> None:
    if config.offloading:
        raise TrainingError("offloading is not available yet; turn it off, and use gradient_checkpointing for memory")
    if config.quantized_backward:
        raise TrainingError("quantized_backward is not available yet, as there are no quantized weights; turn it off")


def _capped_note(plan: Plan) -> tuple[str, ...]:
    if not plan.capped:
        return ()
    first = plan.capped[0]
    return (
        f"Rank {plan.rank} is more than {len(plan.capped)} of {len(plan.adapters)} layers can hold; "
        f"they get their own size instead, such as {first.rank} at {first.path}.",
    )
