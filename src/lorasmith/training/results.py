"""The results of a run: its LoRA with metadata (see `formats.metadata`), the best one, and the losses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch

from lorasmith.adapters.algorithms import facts_of, format_named, format_of
from lorasmith.adapters.variants import OrthogonalAdapter, rank_ordered
from lorasmith.core.adapter_state import DENOISER, SD_SCRIPTS, AdapterState, ModuleRef
from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import OutputError
from lorasmith.core.extensions import HEADER_ENTRY, as_json
from lorasmith.core.files import is_full, write_atomic
from lorasmith.core.placement import dtype_from_name, dtype_name
from lorasmith.core.power_average import AVERAGES, LENGTHS
from lorasmith.core.printable import count_text, printable
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoder_digest import RememberedDigests, file_sha256
from lorasmith.data.encoding_cache import default_cache
from lorasmith.diffusion.schedule import DiscreteSchedule
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.metadata import (
    AVERAGE_ENTRY,
    RANKS_ENTRY,
    RUN_ENTRY,
    LeveledRanks,
    autov1,
    average_entry,
    tag_frequency,
    without_private,
)
from lorasmith.formats.names import encoder_module
from lorasmith.report.pictures import card, embedded_picture, embedded_png
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.events import Outcome, Warned
from lorasmith.training.job import TrainJob
from lorasmith.training.loop import Loop
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.records import RunRecord
from lorasmith.training.storage.run_states import STATES, RunStates
from lorasmith.training.validation import TOO_EARLY, UNJUDGED
from lorasmith.training.watchers import LikenessWatch, ValidationWatch


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The result of a run.

    Attributes:
        lora: the LoRA after the last good step; for a run that stopped early or failed, the best one.
        losses: loss of each step, those before a resumption included; NaN for a skipped step.
        steps: all steps, those of a continued LoRA included.
        reason: why the run ended.
        best_step: step of the run with the best LoRA, on held-out images or by early_stop likeness; None without both.
        validations: (step, loss) on the held-out images.
        base_loss: loss of the base model on the held-out images, None if none are held out.
        verdict: interpretation of the validations, in a sentence.
        folder: the run's folder, None without output.
        path: the LoRA in it.
        best_path: the LoRA of `best_step`, if that is another one.
    """

    lora: Lora
    losses: list[float]
    steps: int
    reason: Outcome
    validations: tuple[tuple[int, float], ...] = ()
    base_loss: float | None = None
    verdict: str = UNJUDGED
    folder: Path | None = None
    path: Path | None = None
    best_path: Path | None = None
    best_step: int | None = None

    @typed_arguments
    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the loss curve as a PNG file, which is replaced; returns its path.

        Raises:
            OutputError: no loss is finite, or the file cannot be written.
        """
        target = Path(path)
        write_atomic(target, self._curve())
        return target

    def __repr__(self) -> str:
        from lorasmith.report.loss_plot import recent_loss

        recent = recent_loss(self.losses)
        facts = [f"{self.reason} after {count_text(self.steps, 'step')}"]
        if recent.steps:
            facts.append(f"loss {recent.mean:.4f} ({recent.label})")
        if self.validations and self.base_loss:
            best = min(loss for _, loss in self.validations)
            facts.append(f"held out {100 * (best / self.base_loss - 1):+.1f} % at best")
        facts += [] if self.path is None else [f"LoRA at {printable(str(self.path), limit=160)}"]
        return f"TrainResult({', '.join(facts)})"

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {
            "ended": f"{self.reason} after {count_text(self.steps, 'step')}",
            "verdict": self.verdict,
            "LoRA": "" if self.path is None else str(self.path),
            "best LoRA": "" if self.best_path is None else str(self.best_path),
            "report": "" if self.folder is None else str(self.folder / "report.html"),
        }
        pictures: list[object] = []
        if any(map(math.isfinite, self.losses)):
            pictures.append(embedded_png(self._curve(), "loss of each step"))
        if self.folder is not None:
            for name, alt in {"steps.png": "previews by step", "strengths.png": "previews by strength"}.items():
                pictures.append(embedded_picture(self.folder / "samples" / name, alt))
        return card(f"Training of {self.lora.name}", facts, *pictures)

    def _curve(self) -> bytes:
        from lorasmith.report.loss_plot import plot_losses

        return plot_losses(self.losses, validations=self.validations, base_loss=self.base_loss)


@dataclass
class Results:
    """Makes and saves LoRAs from a job's adapters; writes no files if `folder` is None."""

    job: TrainJob
    data: EncodedDataset
    title: str
    trigger: str | None
    record: RunRecord
    folder: Path | None
    hashes: BaseHashes  # in the metadata once they are computed
    started: float = field(default_factory=time.time)

    def lora(self, step: int) -> Lora:
        """The LoRA in the job's adapters, on the CPU after `Engine.release` or inside of `Engine.exported`."""
        metadata = training_metadata(
            self.job,
            self.data,
            title=self.title,
            trigger=self.trigger,
            steps=self.job.steps_before + step,
            started=self.started,
            record=self.record,
            hashes=self.hashes,
        )
        return lora_of(self.job, metadata)

    def save(self, loop: Loop, path: Path) -> None:
        self.lora(loop.step).save(path)

    def save_result(self, loop: Loop, path: Path) -> None:
        self._saved(self.lora(loop.step), path)

    def _saved(self, lora: Lora, path: Path) -> Path:
        """Save a LoRA as users get it, and its word beside it, as an embedding."""
        for vectors in lora.state.words.values():
            write_safetensors(embedding_beside(path), vectors, {"lorasmith.steps": str(lora.steps)})
        if not self.job.config.new_word_bundle:
            lora = replace(lora, state=replace(lora.state, words={}))
        return lora.save(path)

    def path_at(self, step: int) -> Path:
        """File of the LoRA of a step, numbered as in sd-scripts; the run must have a folder."""
        assert self.folder is not None
        return self._path(self.folder, f"-step{self.job.steps_before + step:08}")

    def save_best(self, loop: Loop) -> None:
        if self.folder is not None:
            with loop.engine.exported():
                self.save_result(loop, self._path(self.folder, "-best"))

    def save_averages(self, loop: Loop, steps: Sequence[int]) -> None:
        """Save the averages after this step, one of those after which they are saved; the run must have a folder.

        In 16 bits they are in fp16, as sums of several have to be more exact than bf16.
        """
        averages, folder = loop.engine.power_averages, self.folder
        assert averages is not None and folder is not None
        for sigma_rel, values in zip(LENGTHS, averages, strict=True):
            with loop.engine.exported(values):
                lora = self.lora(loop.step)
            entry = {AVERAGE_ENTRY: average_entry(sigma_rel, loop.step, steps)}
            if lora.dtype == torch.bfloat16:
                lora = replace(lora, dtype=torch.float16)
            path = folder / AVERAGES / f"{self.title}-step{loop.step:08}-ema{sigma_rel:.2f}.safetensors"
            path.parent.mkdir(exist_ok=True)
            lora.save(path, metadata=entry)

    def collect(
        self,
        loop: Loop,
        reason: Outcome,
        validation: ValidationWatch | None,
        kept: ValidationWatch | LikenessWatch | None,
        *,
        prefer_best: bool,
    ) -> TrainResult:
        """Release the weights of an ended loop, the best that were `kept` if `prefer_best`, and save them."""
        best = None if kept is None else kept.best
        best_step = None if kept is None or best is None else kept.best_step
        history = None if validation is None or validation.best is None else validation.history
        values = best if prefer_best else None
        step = loop.step if values is None or best_step is None else best_step
        best_path = None
        if self.folder is not None:
            for path in (self._path(self.folder, "-best"), embedding_beside(self._path(self.folder, "-best"))):
                path.unlink(missing_ok=True)
            if best_step is not None and best_step != step:
                best_path = self._path(self.folder, "-best")
                with loop.engine.exported(best):
                    self._saved(self.lora(best_step), best_path)
        loop.engine.release(values)
        lora = self.lora(step)
        is_saved = self.folder is not None and bool(loop.losses)
        return TrainResult(
            lora,
            loop.losses,
            self.job.steps_before + step,
            reason,
            validations=() if history is None else tuple(history.losses),
            base_loss=None if history is None else history.base_loss,
            verdict=UNJUDGED if validation is None else TOO_EARLY if history is None else history.verdict,
            folder=self.folder if is_saved else None,
            path=self._saved_at_last(lora, self.folder, loop) if self.folder is not None and is_saved else None,
            best_path=best_path if is_saved else None,
            best_step=best_step,
        )

    def _saved_at_last(self, lora: Lora, folder: Path, loop: Loop) -> Path:
        """Save the result. On a full disk it takes the room of run states but the one that an unfinished run needs."""
        states, least = RunStates(folder / STATES, keep=1), int(loop.outcome is None or not loop.outcome.is_final)
        while True:
            try:
                return self._saved(lora, self._path(folder))
            except OutputError as error:
                if not is_full(error) or not states.remove_oldest(least=least):
                    raise
                loop.emit(Warned(message="The disk is full: a run state is removed to make room for the LoRA."))

    def _path(self, folder: Path, suffix: str = "") -> Path:
        return folder / f"{self.title}{suffix}.safetensors"


def embedding_beside(lora: Path) -> Path:
    """The file of the word that a LoRA was trained with."""
    return lora.with_name(f"{lora.stem}_emb.safetensors")


def lora_of(job: TrainJob, metadata: Mapping[str, str]) -> Lora:
    """The LoRA in a job's adapters, on the CPU after `Engine.release` or inside of `Engine.exported`."""
    trained = {ModuleRef(DENOISER, path): adapter.to_weights() for path, adapter in job.adapters.items()}
    trained |= {
        encoder_module(job.model.names, path): adapter.to_weights() for path, adapter in job.text_adapters.items()
    }
    changes = {ref: dict(tensors) for ref, tensors in job.carried.differences.items()}
    for path, difference in job.differences.items():
        changes.setdefault(ModuleRef(DENOISER, path), {}).update(difference.to_tensors())
    for ref, role in [(ref, format_of(weights).difference) for ref, weights in trained.items()]:
        if role:  # files hold it as a difference
            changes.setdefault(ref, {})["weight"] = trained.pop(ref).tensors[role]
    state = AdapterState(
        adapters={**job.carried.adapters, **trained},
        differences=changes,
        unknown=job.carried.unknown,
        metadata=dict(metadata),
        words=job.model.words,
    )
    return Lora(state, job.model.names, dtype_from_name(job.config.lora_dtype), job.config.private)


_ONE_AT_A_TIME = threading.Lock()
"""Of runs that train together, the first hashes the base model; the others reuse its digest."""

_DATASET = "dataset"
"""Stands for the name of the image folder in sd-scripts' entries."""


def training_metadata(
    job: TrainJob,
    data: EncodedDataset,
    *,
    title: str,
    trigger: str | None,
    steps: int,
    started: float,  # seconds since 1970
    record: RunRecord | None,
    hashes: BaseHashes,  # left out until they are known
) -> dict[str, str]:
    """Header metadata of a LoRA, sorted by key; `steps` include those of a continued LoRA."""
    entries = {
        **_kohya(job, data, title=title, steps=steps, started=started),
        "ss_sd_model_hash": hashes.autov1,
        "ss_new_sd_model_hash": hashes.sha256,
        **_modelspec(job, data, title=title, trigger=trigger or ""),
        "lorasmith.steps": steps,
        "lorasmith.algorithm": job.config.algorithm.lower(),
        "lorasmith.targets": job.config.targets,
        "lorasmith.lora_dtype": job.config.lora_dtype,
        "lorasmith.config": asdict(job.config),
        HEADER_ENTRY: as_json(job.extensions) or None,
        "ss_training_comment": f"trigger: {trigger}" if trigger else "",
        RANKS_ENTRY: _leveled_ranks(job),
        RUN_ENTRY: "" if record is None else record.to_entry(),
    }
    metadata = {key: _text(value) for key, value in sorted(entries.items()) if value is not None and value != ""}
    return without_private(metadata) if job.config.private else metadata


def _leveled_ranks(job: TrainJob) -> str:
    """The entry of a T-LoRA, empty for others."""
    if job.config.rank_schedule is None:
        return ""
    adapters = rank_ordered(job.adapters).values()
    copies = 2 if any(isinstance(adapter, OrthogonalAdapter) for adapter in adapters) else 1
    schedule = job.model.diffusion.schedule
    return LeveledRanks(
        replace(job.config.rank_schedule, copies=copies),
        total=sum(adapter.rank * copies for adapter in adapters),
        shift=schedule.shift,
        steps=len(schedule.sigmas) if isinstance(schedule, DiscreteSchedule) else 0,
    ).to_entry()


class BaseHashes:
    """Hashes of a single-file base model, computed on a thread inside its context; empty until they are known."""

    def __init__(self, path: Path | None) -> None:
        self.sha256 = self.autov1 = ""
        self._path = path
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._hash, name="lorasmith-hashes", daemon=True)

    def __enter__(self) -> Self:
        if self._path is not None and self._path.is_file():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def wait(self, cancelled: Callable[[], bool]) -> None:
        """Return when the hashes are known, or `cancelled` returns True."""
        while self._thread.is_alive() and not cancelled():
            self._thread.join(0.2)

    def _hash(self) -> None:
        assert self._path is not None
        with _ONE_AT_A_TIME, contextlib.suppress(OSError):
            sha256 = file_sha256(self._path, RememberedDigests(default_cache()), each_block=self._go_on)
            self.autov1 = autov1(self._path)
            self.sha256 = sha256

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError  # an OSError


def _kohya(job: TrainJob, data: EncodedDataset, *, title: str, steps: int, started: float) -> dict[str, object]:
    config, facts = job.config, job.model.facts
    version = facts.kohya_version
    algorithm, arguments = config.algorithm.lower(), _lycoris_arguments(config)
    is_plain = SD_SCRIPTS in format_named(algorithm).programs and not arguments
    per_step = config.samples_per_step
    epochs = -(-(steps - job.steps_before) * per_step // len(data))
    images, of_class = (
        len({sample.name for sample in data.samples if sample.is_class is wanted}) for wanted in (False, True)
    )
    tags = _tags(data)
    buckets = Counter(_picture_sizes(job, data))
    width, height = max(buckets, key=_area)
    dtype = dtype_name(job.way.dtype)
    return {
        "ss_base_model_version": version,
        "ss_v2": version.startswith("sd_v2"),
        "ss_network_module": "networks.lora" if is_plain else "lycoris.kohya",
        "ss_network_dim": config.rank,
        "ss_network_alpha": float(config.alpha),
        "ss_network_args": {} if is_plain else {"algo": algorithm, **arguments},
        "ss_sd_model_name": facts.title,
        "ss_output_name": title,
        "ss_training_started_at": started,
        "ss_training_finished_at": time.time(),
        "ss_resolution": f"({width}, {height})",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_epoch": epochs,
        "ss_num_epochs": epochs,
        "ss_num_train_images": images,
        "ss_num_reg_images": of_class,
        "ss_num_batches_per_epoch": -(-len(data) // per_step),
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_text_encoder_lr": next((job.learning_rates[path] for path in job.text_adapters), None),
        "ss_optimizer": config.optimizer,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": per_step,
        "ss_gradient_accumulation_steps": config.grad_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": config.warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_loss_type": {"MSE": "l2", "SmoothL1": "smooth_l1"}.get(config.loss_function, config.loss_function.lower()),
        "ss_seed": config.seed,
        "ss_slider": config.consequences().is_slider or None,
        "ss_mixed_precision": "no" if dtype == "fp32" else dtype,
        "ss_cache_latents": True,
        "ss_enable_bucket": len(buckets) > 1,
        "ss_bucket_info": {
            "buckets": {
                str(number): {"resolution": list(size), "count": count}
                for number, (size, count) in enumerate(sorted(buckets.items()))
            }
        },
        "ss_dataset_dirs": {_DATASET: {"n_repeats": 1, "img_count": images}},
        "ss_tag_frequency": {_DATASET: tags} if tags else None,
    }


def _modelspec(job: TrainJob, data: EncodedDataset, *, title: str, trigger: str) -> dict[str, object]:
    facts, parameterization = job.model.facts, job.model.diffusion.parameterization
    width, height = max(_picture_sizes(job, data), key=_area)
    tags = _tags(data)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.modelspec_architecture}/lora" if facts.modelspec_architecture else "",
        "modelspec.implementation": facts.modelspec_implementation,
        "modelspec.title": title or "LoRA",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.trigger_phrase": trigger,
        # ModelSpec has no prediction type for flow models.
        "modelspec.prediction_type": "" if parameterization == "flow" else parameterization,
        "modelspec.tags": ", ".join(list(tags)[:20]),
    }


def _lycoris_arguments(config: ResolvedConfig) -> dict[str, object]:
    arguments = {
        "dora_wd": config.dora != "none",
        "wd_on_output": config.dora == "output",
        "rs_lora": config.rslora,
        "use_tucker": config.tucker,
    }
    size = {"factor": config.rank} if facts_of(config.algorithm).rank_meaning == "factor" else {}
    return {**{name: value for name, value in arguments.items() if value}, **size}


def _picture_sizes(job: TrainJob, data: EncodedDataset) -> list[tuple[int, int]]:
    """Width and height in pixels of each sample's picture."""
    factor = job.model.facts.downscale
    return [(sample.latents.shape[-1] * factor, sample.latents.shape[-2] * factor) for sample in data.samples]


def _tags(data: EncodedDataset) -> dict[str, int]:
    """Tags of the subject's captions, with their frequency."""
    return tag_frequency(sample.conditioning.text or "" for sample in data.samples if not sample.is_class)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _text(value: object) -> str:
    """A value as text: numbers and booleans as Python prints them, structures as JSON."""
    if isinstance(value, (str, int, float)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=False)
