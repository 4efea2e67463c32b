"""Train a LoRA: from a model, encoded samples and a configuration to a LoRA that can be saved.

This is the one way in for command line, nodes and library. What is decided before the first step is in `job`, the loop
in `loop`, what happens between its steps in `watchers`; here is what happens around all of it: the folder of the run,
going on where it stopped, and keeping what there is, whatever ends it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.algorithms import format_of
from lorasmith.core import fp8_products
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.dtypes import chosen_dtype, dtype_from_name, dtype_name
from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import write_atomic
from lorasmith.core.options import config_from
from lorasmith.core.placement import best_device, chosen_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.split import Split, split
from lorasmith.families.model import Denoiser, Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, Recipe
from lorasmith.training.events import Event, EventHandler, Resumed, RunFinished, RunStarted, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.loop import Loop, RunState, Watcher
from lorasmith.training.lora_handle import Lora
from lorasmith.training.memory.compilation import sizes_vary
from lorasmith.training.runs.fingerprint import differences
from lorasmith.training.runs.records import run_record, training_metadata
from lorasmith.training.runs.run_folder import RunFolder, claimed_run
from lorasmith.training.runs.run_states import Checkpointer, free_bytes
from lorasmith.training.verdict import UNJUDGED
from lorasmith.training.watchers import Draw, PreviewWatch, ValidationWatch

__all__ = ["Job", "Surroundings", "TrainResult", "plan_job", "recipe_of", "run_job", "train"]


_CHECKPOINT_BYTES = 16
"""Of a checkpoint for each trained number: the weights in fp32, their average, and two moments of the optimizer."""


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        lora: the LoRA as it stands after the last good step; of a run that validation stopped or that failed, the best
            one on the held-out images.
        losses: loss of each step taken, those before a resumption included; NaN for a step that was left out.
        steps: steps in all, those of the LoRA that was continued included.
        reason: `finished`, `stopped` (early, by validation), `cancelled` or `failed`.
        validations: steps and losses on the held-out images.
        base_loss: theirs of the base model, None where nothing is held out.
        verdict: what validation makes of it, in a sentence.
        folder: the run's folder, if one was asked for.
        path: the LoRA in it.
        best_path: the LoRA that did best on the held-out images, where that is another one.
    """

    lora: Lora
    losses: list[float]
    steps: int
    reason: str = "finished"
    validations: tuple[tuple[int, float], ...] = ()
    base_loss: float | None = None
    verdict: str = ""
    folder: Path | None = None
    path: Path | None = None
    best_path: Path | None = None

    def plot(self, path: str | Path) -> Path:
        """Draw the loss curve as a PNG."""
        from lorasmith.report.loss_plot import plot_losses

        target = Path(path)
        write_atomic(target, plot_losses(self.losses, validations=self.validations, base_loss=self.base_loss))
        return target


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run is given besides job and data.

    Attributes:
        output: folder of the run, or a function that chooses it by the run's fingerprint; None to write nothing. A
            folder that holds the same run, broken off, is continued.
        fresh: move a run that is there aside instead of continuing it.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        device: where to train; the first GPU, or the CPU, if None.
        validation: images to judge the run by, instead of a share of the data.
        previews: for the folder of the run, what draws its previews; None draws none.
        source: how the run was asked for, as JSON can carry it, so that it can be asked for again.
        on_event: receives typed events.
        cancelled: asked between steps; True ends the run with what there is.
        until: step of the run behind which it is cancelled; None for none.
    """

    output: Path | Callable[[Mapping[str, Any]], Path] | None = None
    fresh: bool = False
    title: str = "lora"
    trigger: str | None = None
    device: torch.device = field(default_factory=best_device)
    validation: EncodedDataset | None = None
    previews: Callable[[Path], Draw | None] = lambda folder: None
    source: Mapping[str, Any] = field(default_factory=dict)
    on_event: EventHandler = lambda event: None
    cancelled: Callable[[], bool] = lambda: False
    until: int | None = None


def train(
    model: Model | Denoiser,
    data: EncodedDataset,
    *,
    config: TrainConfig | None = None,
    output: str | Path | None = None,
    title: str = "lora",
    trigger: str | None = None,
    device: str | torch.device | None = None,
    validation: EncodedDataset | None = None,
    fresh: bool = False,
    on_event: EventHandler | None = None,
    cancelled: Callable[[], bool] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a LoRA.

    Args:
        model: the base model, with or without LoRAs applied; it is left exactly as it was.
        data: encoded samples.
        config: all settings; `settings` are laid over it.
        output: folder of the run, or None to write nothing. If it holds the same run (settings, model, data), broken
            off, that one goes on to the bit.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        device: where to train; the first GPU, or the CPU, if None.
        validation: images to judge the run by, instead of a share of `data`.
        fresh: move a run that is in `output` aside, and start anew.
        on_event: receives typed events.
        cancelled: asked between steps; True ends the run with what there is.
        **settings: fields of `TrainConfig`.

    Raises:
        LorasmithError: the settings, the data or an existing LoRA do not fit, or the loss became non-finite. If some
            steps were taken and there is an output folder, their LoRA is in it and the message says where.
    """
    config = config_from(TrainConfig, {**(asdict(config) if config else {}), **settings})
    device = chosen_device(device)
    job = plan_job(model if isinstance(model, Denoiser) else model.denoiser, config, device)
    around = Surroundings(
        output=None if output is None else Path(output),
        fresh=fresh,
        title=title,
        trigger=trigger,
        device=device,
        validation=validation,
        on_event=on_event or Surroundings.on_event,
        cancelled=cancelled or Surroundings.cancelled,
    )
    return run_job(job, data, around)


def run_job(job: Job, data: EncodedDataset, around: Surroundings) -> TrainResult:
    """Train what `plan_job` decided on; a job is run once. Errors as for `train`."""
    parts = split(data, share=job.config.validation_share, given=around.validation)
    record = run_record(job, parts, title=around.title, source=around.source, device=around.device)
    if around.output is None:
        return _Run(job, parts, around, record, None)(None)
    path = around.output if isinstance(around.output, Path) else around.output(record["fingerprint"])
    with claimed_run(path, record, fresh=around.fresh, tell=around.on_event) as (folder, start):
        seen = folder.environments()
        return _Run(job, parts, around, {**record, "environments": seen} if len(seen) > 1 else record, folder)(start)


def recipe_of(job: Job, device: torch.device) -> Recipe:
    """What the engine needs to know of a planned run."""
    config = job.config
    assert config.learning_rate and config.timesteps and config.schedule  # decided by plan_job
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
        optimizer_args=config.optimizer_args,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_steps=config.warmup_steps,
        final_rate=config.final_rate,
        schedule_cycles=config.schedule_cycles,
        schedule_power=config.schedule_power,
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm,
        max_rollbacks=config.max_rollbacks,
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
        dtype=chosen_dtype(config.training_dtype, job.denoiser.module),
        device=device,
        deterministic=config.deterministic,
        checkpoint_depth=config.checkpoint_depth if config.gradient_checkpointing else 0,
        activations=_activations(config, device),
        memory_budget=None if config.memory_budget is None else int(config.memory_budget * 2**30),
        quantization=config.quantization,
        offloading=config.offloading and device.type != "cpu",
        compile=config.compile,
        quantized_backward=config.quantized_backward and fp8_products.has_fp8_products(device),
    )


def _activations(config: TrainConfig, device: torch.device) -> str:
    """How activations are kept where the setting has an effect; notes say where it has none."""
    is_idle = config.compile or (config.activations == "host" and device.type == "cpu")
    return "keep" if is_idle else config.activations


def _lacking_space(folder: Path, job: Job) -> str:
    """What to say where the disk has no room for a run's checkpoints; empty where it has."""
    kept = job.config.keep_checkpoints + 1  # an older one is removed when the new one is there
    needed, free = kept * _CHECKPOINT_BYTES * job.parameters, free_bytes(folder)
    if free > needed:
        return ""
    return (
        f"{free / 2**30:.1f} GiB are free on the disk, and {kept} checkpoints may take {needed / 2**30:.1f} GiB: fewer "
        "are kept where it is full; free some space, or lower keep_checkpoints."
    )


class _Run:
    """One run: training, then the LoRA with its metadata, then the records, whatever ended it."""

    def __init__(
        self, job: Job, parts: Split, around: Surroundings, record: Mapping[str, Any], folder: RunFolder | None
    ) -> None:
        self._job = job
        self._parts = parts
        self._around = around
        self._record = record
        self._folder = folder
        self._recipe = replace(recipe_of(job, around.device), varying_sizes=sizes_vary(parts.training.samples))
        self._started = time.time()
        self._draw = None if folder is None else around.previews(folder.path)
        self._handlers: list[EventHandler] = [around.on_event] if folder is None else [folder, around.on_event]
        self._validation: ValidationWatch | None = None
        if parts.held_out:
            self._validation = ValidationWatch(
                job.denoiser, parts.held_out.samples, self._recipe, job.config, self._keep_best
            )

    def __call__(self, start: RunState | None) -> TrainResult:
        job = self._job
        engine = Engine(job.denoiser, job.adapters, self._recipe, job.differences)
        around = self._around
        loop = Loop(engine, self._parts.training.samples, self._tell, around.cancelled, self._watchers(), around.until)
        reason = "failed"
        try:
            if start is not None:
                loop.load(start)
            self._announce(start)
            with self._tracked():
                loop.run()
            reason = loop.reason
        except BaseException as error:
            # Whatever ended the run, the steps that were taken are worth keeping; the error then goes on its way.
            self._tell(RunFinished(step=loop.step, reason=reason))
            if kept := self._salvaged(loop, reason):
                if isinstance(error, LorasmithError):
                    raise type(error)(f"{error}; {kept}") from error
                error.add_note(kept)
            raise
        result = self._kept(loop, reason, best=reason == "stopped")
        if result.path is not None and self._draw is not None:
            for event in self._draw(result.steps - job.steps_before, result.path, final=True):
                self._tell(event)
        self._tell(RunFinished(step=loop.step, reason=reason))
        self._extra("report", self._write_report)
        return result

    def _salvaged(self, loop: Loop, reason: str) -> str:
        """Save what a run leaves that failed; returns where it is, in words, or what went wrong with that as well."""
        try:
            result = self._kept(loop, reason, best=True)
        except Exception as error:  # such as a full disk, or a device that is gone; what failed first counts more
            return f"what there was could not be saved ({error})"
        if result.path is None:
            return ""
        self._extra("report", self._write_report)
        return f"the LoRA of {result.steps} steps is at {result.path}"

    def _tell(self, event: Event) -> None:
        for handler in self._handlers:
            handler(event)

    def _write_report(self) -> None:
        from lorasmith.training.runs.run_page import write_report

        if self._folder is not None:
            write_report(self._folder.path)

    def _extra(self, what: str, make: Callable[[], object]) -> None:
        """Make something that a run can do without once its LoRA is saved."""
        try:
            make()
        except Exception as error:  # whatever it is, the result is worth more
            self._tell(Warned(message=f"The LoRA is saved, but the {what} is not: {error}"))

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Send the numbers to a tracker meanwhile, where one is asked for."""
        config = self._job.config
        if config.track == "none" or self._folder is None:
            yield
            return
        from lorasmith.training.runs.trackers import tracker_for

        title = self._around.title
        with contextlib.closing(
            tracker_for(config.track, self._folder.path, title, asdict(config), tell=self._tell)
        ) as tracker:
            self._handlers.append(tracker)
            yield

    def _watchers(self) -> list[Watcher]:
        """In the order in which they are called: a checkpoint holds the validation of its step."""
        config, folder = self._job.config, self._folder
        watchers: list[Watcher] = [self._validation] if self._validation else []
        if folder is not None:
            watchers.append(
                Checkpointer(
                    folder.checkpoints(config.keep_checkpoints, asdict(config)),
                    every=config.checkpoint_every,
                    minutes=config.checkpoint_minutes,
                    before=folder.flush,
                )
            )
            if self._draw is not None:
                watchers.append(PreviewWatch(self._draw, self._save, folder.path / "preview.safetensors", config))
        return watchers

    def _announce(self, start: RunState | None) -> None:
        job, folder = self._job, self._folder
        self._tell(
            RunStarted(
                steps=self._recipe.steps,
                steps_before=job.steps_before,
                samples=len(self._parts.training),
                adapters=len(job.adapters),
                parameters=job.parameters,
                device=str(self._recipe.device),
                dtype=dtype_name(self._recipe.dtype),
                folder="" if folder is None else str(folder.path),
            )
        )
        if start is None:
            for note in (*job.notes, *([f"{self._parts.note}."] if self._parts.held_out else [])):
                self._tell(Warned(message=note))
            if folder is not None and (lack := _lacking_space(folder.path, job)):
                self._tell(Warned(message=lack))
        elif folder is not None:
            now = self._record["environment"]
            found = list(dict.fromkeys(word for before in folder.environments() for word in differences(before, now)))
            if self._recipe.device.type == "cuda" and not self._recipe.deterministic:
                found.append("the order in which a GPU adds up, for deterministic is off")
            if self._recipe.compile and self._recipe.varying_sizes:
                found.append("the sizes that compiled code meets first")
            same = "to the bit" if not found else f"not to the bit, for what differs is {'; '.join(found)}"
            self._tell(Resumed(step=start.step, message=f"Going on with {folder.path} from step {start.step}, {same}."))

    def _keep_best(self, loop: Loop) -> None:
        if self._folder is not None:
            with loop.engine.exported():
                self._save(loop, self._path("-best"))

    def _save(self, loop: Loop, path: Path) -> None:
        """Save the LoRA that the adapters hold."""
        self._lora(loop.step).save(path)

    def _kept(self, loop: Loop, reason: str, *, best: bool) -> TrainResult:
        """Take the weights back from the engine, the best ones or the last, and save them."""
        watch = self._validation
        history = watch.history if watch is not None and watch.best is not None else None
        values = watch.best if watch is not None and best else None
        step = loop.step if values is None or history is None else history.best_step
        best_path = None
        if self._folder is not None:
            self._path("-best").unlink(missing_ok=True)
            if watch is not None and history is not None and history.best_step != step:
                best_path = self._path("-best")
                with loop.engine.exported(watch.best):
                    self._lora(history.best_step).save(best_path)
        loop.engine.release(values)
        result = TrainResult(
            self._lora(step),
            loop.losses,
            self._job.steps_before + step,
            reason,
            () if history is None else tuple(history.losses),
            None if history is None else history.base_loss,
            UNJUDGED if history is None else history.verdict,
        )
        if self._folder is None or not loop.losses:
            return result
        path = result.lora.save(self._path(""))
        if any(map(math.isfinite, result.losses)):
            self._extra("loss plot", lambda: result.plot(path.with_name("loss.png")))
        return replace(result, folder=self._folder.path, path=path, best_path=best_path)

    def _path(self, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{self._around.title}{suffix}.safetensors"

    def _lora(self, step: int) -> Lora:
        """What the adapters hold, as the LoRA of a step."""
        job = self._job
        trained = {ModuleRef(DENOISER, path): adapter.to_weights() for path, adapter in job.adapters.items()}
        changes = {ref: dict(tensors) for ref, tensors in job.carried.differences.items()}
        for path, one in job.differences.items():
            changes.setdefault(ModuleRef(DENOISER, path), {}).update(one.to_tensors())
        for ref, role in [(ref, format_of(weights).difference) for ref, weights in trained.items()]:
            if role:  # files hold it as a difference
                changes.setdefault(ref, {})["weight"] = trained.pop(ref).tensors[role]
        metadata = training_metadata(
            job,
            self._parts.training,
            title=self._around.title,
            trigger=self._around.trigger,
            steps=job.steps_before + step,
            started=self._started,
            record=self._record,
        )
        state = AdapterState(
            adapters={**job.carried.adapters, **trained},
            differences=changes,
            unknown=job.carried.unknown,
            metadata=metadata,
        )
        return Lora(state, job.denoiser.base.names, dtype_from_name(job.config.lora_dtype), job.config.private)
