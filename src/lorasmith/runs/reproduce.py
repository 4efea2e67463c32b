"""Recorded runs again: resumed from a folder, or reproduced from the metadata of a LoRA and compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.core.errors import OptionError, OutputError, TrainingError
from lorasmith.core.extensions import recorded_extensions
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text, printable
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import RUN_ENTRY, sha256_body, steps_of
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.recorded_run import Typed, repeated
from lorasmith.runs.run import Host, run
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences, environment
from lorasmith.training.storage.records import RECORD, RunRecord, parsed_record
from lorasmith.training.storage.run_folder import RunFolder, check_verifiable
from lorasmith.training.train import Plan


def plan_again(folder: Path, host: Host, typed: Typed = Typed(), *, steps: int | None = None) -> FolderPlan:  # noqa: B008
    """Plan the run in a folder to be resumed.

    `steps` is for a longer run that starts from the end of this one, which has to be complete. A `Warned` says if the
    run starts from the beginning, or its tracker is not started. Raises OptionError if the run was not on a folder of
    images or its record names more than it may, and OutputError if there is no run, it is complete, or another process
    trains it.
    """
    before = RunFolder(folder)
    record = before.record()
    if record.source.get("command") != "train":
        raise OptionError(f"{folder} was not made by lorasmith train; start its workflow or script again to resume it")
    if steps is not None:
        _check_longer(before, record, steps)
    elif before.is_done:
        raise OutputError(
            f"the run in {folder} is complete and cannot be resumed; to train on from its end, give the steps of "
            "the longer run with --steps"
        )
    try:
        spec = repeated(record, folder / RECORD, typed)
    except ValueError as error:
        raise TrainingError(
            f"{folder / RECORD} is damaged ({error}); restore it from a copy, or train again"
        ) from error
    if steps is None:
        spec = replace(spec, output=str(folder))
    else:  # not the path of the record: the folder may have been moved
        spec = spec.with_settings(steps=steps, existing_state=str(before.states().paths()[0].resolve()))
    planned = plan(spec, host)
    tracker = record.asked.get("track")
    if spec.config.is_default("track") and tracker in {*options_of(TrainConfig)["track"].choices} - {"none"}:
        host.on_event(Warned(message=f"The tracker {tracker} of this run is not started; --track {tracker} starts it."))
    if steps is None and not before.states().paths():
        host.on_event(
            Warned(message=f"{folder} ended before its first run state was saved and starts from the beginning.")
        )
    return planned


def _check_longer(folder: RunFolder, record: RunRecord, steps: int) -> None:
    """Raise OptionError unless the run in a folder is complete, has its last state, and is shorter."""
    run = folder.path
    if not folder.is_done:
        raise OptionError(f"--steps is for a complete run, and that in {run} is not; resume it without --steps first")
    if not folder.states().paths():
        raise OptionError(f"{run} has no run state to continue from; train again with --existing-lora and its LoRA")
    before = record.config.get("steps")
    if isinstance(before, int) and steps <= before:
        raise OptionError(
            f"--steps must be more than the {count_text(before, 'step')} of the run in {run}, got {steps}"
        )


@dataclass(frozen=True, kw_only=True)
class Differs(Event):
    """An input or the environment differs from the original run."""

    what: str  # the difference, with both values
    is_decisive: bool  # affects more than the last bits of the result


@dataclass(frozen=True)
class Reproduced:
    """The result of a reproduction."""

    differs: tuple[str, ...] = ()  # decisive differences; if there are any, nothing was trained
    result: TrainResult | None = None
    is_complete: bool = False  # reached the LoRA's step, so that both can be compared
    is_same: bool = False  # the tensors are bit-identical


class Reproduction(Host):
    """The run that made a LoRA again, and its result compared; around the host of a door.

    `dry_run` only compares the inputs. Raises OptionError if the file has no record of a run on a folder of images, or
    it names more than it may, and OutputError if the typed output contains a run.
    """

    def __init__(self, lora: Path, host: Host, typed: Typed = Typed(), *, dry_run: bool = False) -> None:  # noqa: B008
        self._lora, self._host, self._is_dry = lora, host, dry_run
        metadata = check_safetensors(lora).metadata
        self._before = _record_in(lora, metadata)
        output = typed.spec.output
        if output is not None and RunFolder(Path(output)).exists:
            raise OutputError(f"output must not contain a run, but {output} does; choose another output")
        if dry_run:
            typed = replace(typed, spec=replace(typed.spec, output=None))
        try:
            spec = repeated(self._before, lora, typed)
        except ValueError as error:
            raise _without_record(lora, error) from error
        self.folders = host.folders
        self.runs = None if dry_run else host.runs  # so that a dry run needs no room there
        # Previews and early stopping change no tensor of a run that ends at a given step.
        self.plan = plan(spec.with_settings(previews="", early_stop="validation", patience=0), self)
        self.runs = host.runs
        threads = self._before.environment.get("threads")
        self.threads = threads if isinstance(threads, int) and threads > 0 else None
        self.steps = steps_of(metadata, lora.name) - self.plan.job.steps_before  # after which training ends
        if not 0 < self.steps <= spec.config.steps:
            raise OptionError(
                f"{lora} must be of a step between 1 and {spec.config.steps} of its run, but its metadata says "
                f"{self.steps}; train it again from its images"
            )

    def on_event(self, event: Event) -> None:
        self._host.on_event(event)

    def cancelled(self) -> bool:
        return self._host.cancelled()

    def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        check_verifiable(self._before, fingerprint, self._lora)
        differences = self._differences(fingerprint)
        if differences or self._is_dry:
            raise _Settled(differences)
        return super().folder(replace(plan, fresh=True), fingerprint)

    def reproduce(self, *, verify: bool = False) -> Reproduced:
        """Repeat the run and compare the result, unless there is a decisive difference; emits a `Differs` for each.

        `verify` compares every byte of the base model's files; OutputError if the LoRA has no digests of them.
        """
        try:
            result = run(replace(self.plan, verify=verify, until=self.steps), self)
        except _Settled as settled:
            return Reproduced(differs=settled.differs)
        if result.path is None or len(result.losses) < self.steps:
            return Reproduced(result=result)
        same = sha256_body(result.path) == sha256_body(self._lora)
        return Reproduced(result=result, is_complete=True, is_same=same)

    def _differences(self, fingerprint: Fingerprint) -> tuple[str, ...]:
        """Emit all differences from the original run; returns the decisive ones."""
        job, before = self.plan.job, self._before
        now = environment(job.way.device, job.config.optimizer, compile=job.config.compile, extensions=job.extensions)
        for what in dict.fromkeys(
            difference for there in before.all_environments for difference in differences(there, now)
        ):
            self.on_event(Differs(what=what, is_decisive=False))
        decisive = differences(before.fingerprint, fingerprint)
        for what in decisive:
            self.on_event(Differs(what=what, is_decisive=True))
        return tuple(decisive)


class _Settled(Exception):  # noqa: N818  (nothing went wrong)
    """No training is needed; raised where the folder is chosen, when the fingerprint is known."""

    def __init__(self, differs: tuple[str, ...]) -> None:
        super().__init__()
        self.differs = differs


def _record_in(lora: Path, metadata: Mapping[str, str]) -> RunRecord:
    """The record in a LoRA's metadata. OptionError if there is none of a run on a folder of images."""
    try:
        record = replace(parsed_record(metadata[RUN_ENTRY]), extensions=recorded_extensions(metadata))
    except (KeyError, ValueError) as error:
        raise _without_record(lora, error) from error
    if record.source.get("command") != "train":
        if images := record.source.get("images"):
            raise OptionError(
                f"{lora} is from {printable(images, limit=40)}, which no file holds; call lorasmith.train again with "
                "the same ones and the settings in its metadata to reproduce it"
            )
        remedy = "the workflow in its metadata" if "prompt" in metadata else "its script"
        raise OptionError(f"{lora} was not made by lorasmith train; run {remedy} again to reproduce it")
    return record


def _without_record(lora: Path, error: KeyError | ValueError) -> OptionError:
    damage = "" if isinstance(error, KeyError) else f" that can be used ({error})"
    return OptionError(
        f"{lora} has no record of its run{damage}: it is from another program, was saved with --private, or its "
        "metadata was changed; train it again from its images"
    )
