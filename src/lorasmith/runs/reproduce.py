"""Repeating the run that made a LoRA from its metadata, and comparing inputs and result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import RUN_ENTRY, sha256_body, steps_of
from lorasmith.runs.folder_run import RUNS, PreparedRun, prepare, train_prepared
from lorasmith.runs.model_run import new_run_folder
from lorasmith.runs.recorded_run import Rights, repeated
from lorasmith.training.events import Event, EventHandler
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint, differences, environment
from lorasmith.training.storage.records import RunRecord, parsed_record
from lorasmith.training.storage.run_folder import RunFolder, check_verifiable
from lorasmith.training.train import RunOptions


@dataclass(frozen=True, kw_only=True)
class Differs(Event):
    """An input or the environment differs from the original run."""

    what: str  # the difference, with both values
    is_decisive: bool  # affects more than the last bits of the result


@dataclass(frozen=True)
class Reproduction:
    """A prepared repetition of the run of a LoRA."""

    lora: Path
    before: RunRecord  # the LoRA's record of the original run
    prepared: PreparedRun  # the new run
    steps: int  # step of the LoRA, after which training ends
    output: Path | None  # folder of the new run; None for one under `runs/`


@dataclass(frozen=True)
class Reproduced:
    """The result of a reproduction."""

    differs: tuple[str, ...] = ()  # decisive differences; if there are any, nothing was trained
    result: TrainResult | None = None
    is_complete: bool = False  # reached the LoRA's step, so that both can be compared
    is_same: bool = False  # the tensors are bit-identical


def prepare_reproduction(
    lora: Path,
    *,
    rights: Rights = Rights(),  # noqa: B008 - immutable
    model: str | None = None,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
    data: Path | None = None,
    output: Path | None = None,
    device: str | None = None,
    dry_run: bool = False,
    on_event: EventHandler = lambda event: None,
) -> Reproduction:
    """Prepare the run that made a LoRA; arguments replace those of its record (`recorded_run.repeated`).

    Raises OptionError if the file has no record of a run on a folder of images, or it names more than `rights`, and
    OutputError if `output` contains a run.
    """
    metadata = check_safetensors(lora).metadata
    before = _record_of(lora, metadata)
    if output is not None and RunFolder(output).exists:
        raise OutputError(f"output must not contain a run, but {output} does; choose another output")
    try:
        spec = repeated(
            before, lora, rights, model=model, text_encoders=text_encoders, vae=vae, data=data, device=device
        )
    except ValueError as error:
        raise _without_record(lora, error) from error
    # Previews and early stopping change no tensor of a run that ends at a given step.
    spec = spec.with_settings(previews="", patience=0)
    place, runs = (None, None) if dry_run else (output, RUNS)
    prepared = prepare(spec, output=place, runs=runs, on_event=on_event)
    steps = steps_of(metadata, lora.name) - prepared.job.steps_before
    if not 0 < steps <= spec.config.steps:
        raise OptionError(
            f"{lora} must be of a step between 1 and {spec.config.steps} of its run, but its metadata says {steps}; "
            "train it again from its images"
        )
    return Reproduction(lora, before, prepared, steps, output)


def reproduce(
    again: Reproduction,
    *,
    dry_run: bool = False,
    verify: bool = False,
    on_event: EventHandler = RunOptions.on_event,
    cancelled: Callable[[], bool] = RunOptions.cancelled,
) -> Reproduced:
    """Repeat the run and compare the result, unless there is a decisive difference; emits a `Differs` for each.

    `dry_run` only compares the inputs. `verify` compares every byte of the base model's files; OutputError if the LoRA
    has no digests of them.
    """

    def folder(fingerprint: Fingerprint) -> Path:
        check_verifiable(again.before, fingerprint, again.lora)
        found = _differences(again, fingerprint, on_event)
        if found or dry_run:
            raise _Settled(found)
        return again.output or new_run_folder(RUNS, again.prepared.spec.name)

    try:
        result = train_prepared(
            again.prepared,
            output=folder,
            fresh=True,
            verify=verify,
            until=again.steps,
            on_event=on_event,
            cancelled=cancelled,
        )
    except _Settled as settled:
        return Reproduced(differs=settled.differs)
    if result.path is None or len(result.losses) < again.steps:
        return Reproduced(result=result)
    same = sha256_body(result.path) == sha256_body(again.lora)
    return Reproduced(result=result, is_complete=True, is_same=same)


class _Settled(Exception):  # noqa: N818  (nothing went wrong)
    """No training is needed; raised by the function that chooses the folder, which receives the fingerprint."""

    def __init__(self, differs: tuple[str, ...]) -> None:
        super().__init__()
        self.differs = differs


def _record_of(lora: Path, metadata: Mapping[str, str]) -> RunRecord:
    """The record in a LoRA's metadata. OptionError if there is none of a run on a folder of images."""
    try:
        record = parsed_record(metadata[RUN_ENTRY])
    except (KeyError, ValueError) as error:
        raise _without_record(lora, error) from error
    if record.source.get("command") != "train":
        remedy = "the workflow in its metadata" if "prompt" in metadata else "its script"
        raise OptionError(f"{lora} was not made by lorasmith train; run {remedy} again to reproduce it")
    return record


def _without_record(lora: Path, error: KeyError | ValueError) -> OptionError:
    damage = "" if isinstance(error, KeyError) else f" that can be used ({error})"
    return OptionError(
        f"{lora} has no record of its run{damage}: it is from another program, was saved with --private, or its "
        "metadata was changed; train it again from its images"
    )


def _differences(again: Reproduction, fingerprint: Fingerprint, on_event: EventHandler) -> tuple[str, ...]:
    """Emit all differences from the original run; returns the decisive ones."""
    prepared, before = again.prepared, again.before
    config = prepared.job.config
    now = environment(prepared.job.runtime.device, config.optimizer, compile=config.compile)
    for what in dict.fromkeys(one for there in before.all_environments for one in differences(there, now)):
        on_event(Differs(what=what, is_decisive=False))
    decisive = differences(before.fingerprint, fingerprint)
    for what in decisive:
        on_event(Differs(what=what, is_decisive=True))
    return tuple(decisive)
