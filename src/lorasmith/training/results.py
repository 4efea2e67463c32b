"""The results of a run: its LoRA, the best one on the held-out images, and the losses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.files import write_atomic
from lorasmith.core.placement import dtype_from_name
from lorasmith.core.printable import count_text, printable
from lorasmith.data.dataset import EncodedDataset
from lorasmith.report.pictures import card, embedded_picture, embedded_png
from lorasmith.training.events import Outcome
from lorasmith.training.job import Job
from lorasmith.training.loop import Loop
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.lora_metadata import BaseHashes, training_metadata
from lorasmith.training.storage.records import RunRecord
from lorasmith.training.validation import TOO_EARLY, UNJUDGED
from lorasmith.training.watchers import ValidationWatch


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The result of a run.

    Attributes:
        lora: the LoRA after the last good step; for a run that stopped early or failed, the best one on the held-out
            images.
        losses: loss of each step, those before a resumption included; NaN for a skipped step.
        steps: all steps, those of a continued LoRA included.
        reason: why the run ended.
        validations: (step, loss) on the held-out images.
        base_loss: loss of the base model on the held-out images, None if none are held out.
        verdict: interpretation of the validations, in a sentence.
        folder: the run's folder, None without output.
        path: the LoRA in it.
        best_path: the best LoRA on the held-out images, if it is another one.
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

    def plot(self, path: str | Path) -> Path:
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


def lora_of(job: Job, metadata: Mapping[str, str] = MappingProxyType({})) -> Lora:
    """The LoRA in a job's adapters, on the CPU after `Engine.release` or inside of `Engine.exported`."""
    trained = {ModuleRef(DENOISER, path): adapter.to_weights() for path, adapter in job.adapters.items()}
    changes = {ref: dict(tensors) for ref, tensors in job.carried.differences.items()}
    for path, one in job.differences.items():
        changes.setdefault(ModuleRef(DENOISER, path), {}).update(one.to_tensors())
    for ref, role in [(ref, format_of(weights).difference) for ref, weights in trained.items()]:
        if role:  # files hold it as a difference
            changes.setdefault(ref, {})["weight"] = trained.pop(ref).tensors[role]
    state = AdapterState(
        adapters={**job.carried.adapters, **trained},
        differences=changes,
        unknown=job.carried.unknown,
        metadata=dict(metadata),
    )
    return Lora(state, job.denoiser.base.names, dtype_from_name(job.config.lora_dtype), job.config.private)


class Results:
    """Makes and saves LoRAs from a job's adapters; writes no files if `folder` is None."""

    def __init__(
        self,
        job: Job,
        data: EncodedDataset,
        *,
        title: str,
        trigger: str | None,
        record: RunRecord,
        folder: Path | None,
        hashes: BaseHashes,  # in the metadata once they are computed
    ) -> None:
        self._job = job
        self._data = data
        self._title = title
        self._trigger = trigger
        self._record = record
        self._folder = folder
        self._hashes = hashes
        self._started = time.time()

    def lora(self, step: int) -> Lora:
        job = self._job
        metadata = training_metadata(
            job,
            self._data,
            title=self._title,
            trigger=self._trigger,
            steps=job.steps_before + step,
            started=self._started,
            record=self._record,
            hashes=self._hashes,
        )
        return lora_of(job, metadata)

    def save(self, loop: Loop, path: Path) -> None:
        self.lora(loop.step).save(path)

    def path_at(self, step: int) -> Path:
        """File of the LoRA of a step, numbered as in sd-scripts; the run must have a folder."""
        assert self._folder is not None
        return self._path(self._folder, f"-step{self._job.steps_before + step:08}")

    def save_best(self, loop: Loop) -> None:
        if self._folder is not None:
            with loop.engine.exported():
                self.save(loop, self._path(self._folder, "-best"))

    def collect(
        self, loop: Loop, reason: Outcome, validation: ValidationWatch | None, *, prefer_best: bool
    ) -> TrainResult:
        """Release the weights of an ended loop, the best on held-out images if `prefer_best`, and save them."""
        best = None if validation is None else validation.best
        history = None if validation is None or best is None else validation.history
        values = best if prefer_best else None
        step = loop.step if values is None or history is None else history.best_step
        best_path = None
        if self._folder is not None:
            self._path(self._folder, "-best").unlink(missing_ok=True)
            if history is not None and history.best_step != step:
                best_path = self._path(self._folder, "-best")
                with loop.engine.exported(best):
                    self.lora(history.best_step).save(best_path)
        loop.engine.release(values)
        lora = self.lora(step)
        is_saved = self._folder is not None and bool(loop.losses)
        return TrainResult(
            lora,
            loop.losses,
            self._job.steps_before + step,
            reason,
            validations=() if history is None else tuple(history.losses),
            base_loss=None if history is None else history.base_loss,
            verdict=UNJUDGED if validation is None else TOO_EARLY if history is None else history.verdict,
            folder=self._folder if is_saved else None,
            path=lora.save(self._path(self._folder)) if self._folder is not None and is_saved else None,
            best_path=best_path if is_saved else None,
        )

    def _path(self, folder: Path, suffix: str = "") -> Path:
        return folder / f"{self._title}{suffix}.safetensors"
