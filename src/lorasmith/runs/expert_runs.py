"""Both experts of a model trained by one command: one after the other, each an ordinary run in one folder.

    runs/dog-001/
      high_noise/    the run of dog_high_noise.safetensors
      low_noise/     the run of dog_low_noise.safetensors

One denoiser is loaded at a time; previews load the other one while they are drawn. Images are encoded once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Denoiser, Model
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.runs.drawing import EXPERTS, expert_named, experts_of
from lorasmith.runs.folder_run import RUNS, PreparedRun, prepare, train_prepared
from lorasmith.runs.model_run import new_run_folder
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import Experts
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import EventHandler, Outcome, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences
from lorasmith.training.storage.run_folder import RunFolder, numbered_runs, output_folder


class _CompleteError(LorasmithError):
    """The run of an expert is complete in its folder; raised in every process of the run."""


class ExpertRuns:
    """The runs of both experts.

    The name in `spec` is the start of both LoRAs' names. Without an output, the folder is the one under `runs/` that
    holds these runs unfinished (not if `fresh`), or a new one.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        folders: Folders | None = None,
        fresh: bool = False,
        load: Callable[[ModelFiles, Folders | None], Completed] = load_completed,
    ) -> None:
        _check(spec)
        spec = spec.resolved()
        assert spec.low_noise_model is not None
        self._name, self._folders, self._load, self._fresh = spec.name, folders, load, fresh
        self._specs = {EXPERTS[0]: spec, EXPERTS[1]: replace(spec, model=spec.low_noise_model)}
        self._folder = None if spec.output is None else _own(Path(spec.output), spec.name)
        self._is_chosen = self._folder is None
        self._samples: tuple[EncodedDataset, EncodedDataset | None] | None = None

    def prepare(
        self,
        expert: str,
        *,
        on_event: EventHandler = lambda event: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> PreparedRun:
        """The run of an expert (`drawing.EXPERTS`), ready to start; that of high noise has to come first."""
        _freed()  # of the previous expert
        prepared = prepare(
            replace(self._specs[expert], name=f"{self._name}_{expert}"),
            output=self._folder and self._folder / expert,
            runs=RUNS,
            folders=self._folders,
            on_event=on_event,
            cancelled=cancelled,
            load=self._load,
            configured=lambda config, base: _as_expert(config, base, expert),
            samples=self._samples,
        )
        self._samples = prepared.data, prepared.validation
        found = prepared.spec.files
        for name, one in self._specs.items():  # the parts that were found serve both
            self._specs[name] = one.with_files(found if name == expert else replace(found, model=one.model))
        return prepared

    def train(
        self,
        prepared: PreparedRun,
        expert: str,
        *,
        verify: bool = False,
        until: int | None = None,
        on_event: EventHandler = lambda event: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> TrainResult | None:
        """Train a prepared expert; None if its run is complete already."""
        try:
            return train_prepared(
                prepared,
                output=lambda fingerprint: self._place(expert, fingerprint),
                fresh=self._fresh,
                verify=verify,
                until=until,
                on_event=on_event,
                cancelled=cancelled,
                partner=self._partner(expert),
            )
        except _CompleteError as complete:
            on_event(Warned(message=f"The {expert} expert is trained already, in {complete}."))
            return None

    def lora(self, expert: str) -> Path | None:
        """The LoRA of an expert; None before it is trained."""
        if self._folder is None:
            return None
        path = self._folder / expert / f"{self._name}_{expert}.safetensors"
        return path if path.is_file() else None

    def run(
        self,
        *,
        on_event: EventHandler = lambda event: None,
        cancelled: Callable[[], bool] = lambda: False,
        until: int | None = None,
    ) -> list[TrainResult]:
        """Train both, unless the first run is cancelled."""
        results = []
        for expert in EXPERTS:
            result = self.train(
                self.prepare(expert, on_event=on_event), expert, until=until, on_event=on_event, cancelled=cancelled
            )
            results += [] if result is None else [result]
            if result is not None and result.reason is Outcome.CANCELLED:
                break
        return results

    def _place(self, expert: str, fingerprint: Fingerprint) -> Path:
        """The folder of an expert's run. Raises _CompleteError if that run is complete."""
        if self._folder is None or (self._is_chosen and expert == EXPERTS[0]):  # again, if another run was faster
            unfinished = () if self._fresh else _unfinished(self._name, expert, fingerprint)
            self._folder = next(iter(unfinished), None) or new_run_folder(RUNS, self._name)
        folder = self._folder / expert
        if not self._fresh and _holds(folder, fingerprint) and RunFolder(folder).is_done:
            raise _CompleteError(folder)
        return folder

    def _partner(self, expert: str) -> Callable[[Denoiser, float], Experts]:
        """From an expert with its LoRA, and the LoRA's strength, to both experts."""
        other = EXPERTS[expert == EXPERTS[0]]
        files = ModelFiles(self._specs[other].model)

        def both(denoiser: Denoiser, strength: float) -> Experts:
            model = self._load(files, None).model
            partner, lora = model.denoiser, self.lora(other)
            if lora is not None and strength and expert == EXPERTS[1]:
                partner = Lora.load(lora, model).applied(partner, None, strength=strength).denoiser
            pair = (denoiser, partner) if expert == EXPERTS[0] else (partner, denoiser)
            return experts_of(*pair)

        return both


def _as_expert(config: TrainConfig, base: Model, expert: str) -> TrainConfig:
    """The settings of a run on an expert: on its range of noise levels."""
    low, high = expert_named(base, expert).noise_range
    return replace(config, min_noise=low, max_noise=high)


def _check(spec: RunSpec) -> None:
    for name in ("min_noise", "max_noise", "existing_lora", "existing_state"):
        if (value := getattr(spec.config, name)) is not None:
            raise OptionError(f"{name} is for a run on one expert, got {value} with low_noise_model; leave one out")
    if spec.data.class_prompts and spec.data.class_images is None:
        raise OptionError(
            "class_images must be given with low_noise_model, as one expert alone cannot draw pictures of the class; "
            "name a folder of them"
        )


def _own(output: Path, name: str) -> Path:
    """The output, or the folder in it where it holds other files."""
    if any(RunFolder(output / expert).exists for expert in EXPERTS):
        return output
    return output_folder(output, name)


def _unfinished(name: str, expert: str, fingerprint: Fingerprint) -> Iterator[Path]:
    """Folders that hold this expert's run unfinished, the newest first."""
    for _, path in sorted(numbered_runs(RUNS, name), reverse=True):
        done = all(RunFolder(path / one).is_done for one in EXPERTS)
        if not done and _holds(path / expert, fingerprint) and not RunFolder(path / expert).is_busy:
            yield path


def _holds(folder: Path, fingerprint: Fingerprint) -> bool:
    try:
        return RunFolder(folder).exists and not differences(RunFolder(folder).record().fingerprint, fingerprint)
    except LorasmithError:  # of another model, or damaged: refused where it is used
        return False


def _freed() -> None:
    """Free the memory of a model that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
