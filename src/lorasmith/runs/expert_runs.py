"""Both experts of a model trained by one command: one after the other, each an ordinary run in one folder.

    runs/dog-001/
      high_noise/    the run of dog_high_noise.safetensors
      low_noise/     the run of dog_low_noise.safetensors

One denoiser is loaded at a time; previews load the other one while they are drawn. Images are encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.placement import free_device_memory
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Denoiser, Model
from lorasmith.families.model_search import Completed
from lorasmith.runs.drawing import EXPERTS, expert_named, experts_of
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.run import RUNS, Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import Experts
from lorasmith.sampling.previews import Partner
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences
from lorasmith.training.storage.run_folder import RunFolder, new_run_folder, numbered_runs, output_folder
from lorasmith.training.train import Plan


class _CompleteError(LorasmithError):
    """The run of an expert is complete in its folder; raised in every process of the run."""


class ExpertRuns(Host):
    """The host of both experts' runs, around that of a door.

    The name in `spec` is the start of both LoRAs' names. Without an output, the folder is the one under `runs/` that
    holds these runs unfinished (not if they are fresh), or a new one.
    """

    def __init__(self, spec: RunSpec, host: Host) -> None:
        _check(spec)
        spec = spec.resolved()
        assert spec.low_noise_model is not None
        self._host, self.folders = host, host.folders
        self._name, self._expert = spec.name, EXPERTS[0]
        self._specs = {EXPERTS[0]: spec, EXPERTS[1]: replace(spec, model=spec.low_noise_model)}
        self._folder = None if spec.output is None else _own(Path(spec.output), spec.name)
        self._is_chosen = self._folder is None
        self._samples: tuple[EncodedDataset, EncodedDataset | None] | None = None

    def plan(self, expert: str) -> FolderPlan:
        """Plan the run of an expert (`drawing.EXPERTS`); that of high noise has to come first, and to be trained."""
        free_device_memory()  # of the previous expert
        self._expert = expert
        output = None if self._folder is None else str(self._folder / expert)
        planned = plan(replace(self._specs[expert], name=f"{self._name}_{expert}", output=output), self)
        self._samples = planned.data, planned.validation
        files = planned.spec.files
        for name, spec in self._specs.items():  # the parts that were found serve both
            self._specs[name] = spec.with_files(files if name == expert else replace(files, model=spec.model))
        return planned

    def train(self, planned: FolderPlan) -> TrainResult | None:
        """Train the planned expert; None if its run is complete already."""
        try:
            return run(planned, self)
        except _CompleteError as complete:
            self.on_event(Warned(message=f"The {self._expert} expert is trained already, in {complete}."))
            return None

    def lora(self, expert: str) -> Path | None:
        """The LoRA of an expert; None before it is trained."""
        if self._folder is None:
            return None
        path = self._folder / expert / f"{self._name}_{expert}.safetensors"
        return path if path.is_file() else None

    def on_event(self, event: Event) -> None:
        self._host.on_event(event)

    def cancelled(self) -> bool:
        return self._host.cancelled()

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        return self._host.load(files, folders)

    def configured(self, config: TrainConfig, base: Model) -> TrainConfig:
        """The settings of a run on the expert: on its range of noise levels."""
        low, high = expert_named(base, self._expert).noise_range
        return replace(config, min_noise=low, max_noise=high)

    def samples(self, spec: RunSpec) -> tuple[EncodedDataset, EncodedDataset | None] | None:
        return self._samples

    def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        """The folder of the expert's run. Raises _CompleteError if that run is complete."""
        if self._folder is None or (self._is_chosen and self._expert == EXPERTS[0]):  # again, if another was faster
            unfinished = () if plan.fresh else _unfinished(self._name, self._expert, fingerprint)
            self._folder = next(iter(unfinished), None) or new_run_folder(RUNS, self._name)
        folder = self._folder / self._expert
        if not plan.fresh and holds(folder, fingerprint) and RunFolder(folder).is_done:
            raise _CompleteError(folder)
        return folder

    def partner(self, plan: Plan) -> Partner:
        expert, other = self._expert, EXPERTS[self._expert == EXPERTS[0]]
        files = ModelFiles(self._specs[other].model)

        def both(denoiser: Denoiser, strength: float) -> Experts:
            model = self._host.load(files, None).model
            partner, lora = model.denoiser, self.lora(other)
            if lora is not None and strength and expert == EXPERTS[1]:
                partner = Lora.load(lora, model).applied(partner, None, strength=strength).denoiser
            pair = (denoiser, partner) if expert == EXPERTS[0] else (partner, denoiser)
            return experts_of(*pair)

        return both


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
        done = all(RunFolder(path / expert).is_done for expert in EXPERTS)
        if not done and holds(path / expert, fingerprint) and not RunFolder(path / expert).is_busy:
            yield path


def holds(folder: Path, fingerprint: Fingerprint) -> bool:
    """Whether a folder has a run with this fingerprint."""
    try:
        return RunFolder(folder).exists and not differences(RunFolder(folder).record().fingerprint, fingerprint)
    except LorasmithError:  # of another model, or damaged: refused where it is used
        return False
