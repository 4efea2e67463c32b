"""Preparing an interrupted run on a folder to continue; `train_prepared` with its folder as output resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasmith.core.errors import OptionError, OutputError, TrainingError
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text
from lorasmith.runs.folder_run import RUNS, PreparedRun, prepare
from lorasmith.runs.recorded_run import Rights, repeated
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import EventHandler, Warned
from lorasmith.training.storage.records import RECORD, RunRecord
from lorasmith.training.storage.run_folder import RunFolder


def prepare_again(
    run: Path,
    *,
    rights: Rights = Rights(),  # noqa: B008 - immutable
    model: str | None = None,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
    data: Path | None = None,
    device: str | None = None,
    steps: int | None = None,
    on_event: EventHandler = lambda event: None,
) -> PreparedRun:
    """Prepare the run in a folder; arguments replace those of its record (`recorded_run.repeated`).

    `steps` is for a longer run that starts from the end of this one, which has to be complete. A `Warned` says if the
    run starts from the beginning, or its tracker is not started. Raises OptionError if the run was not on a folder of
    images or its record names more than `rights`, and OutputError if there is no run, it is complete, or another
    process trains it.
    """
    folder = RunFolder(run)
    record = folder.record()
    if record.source.get("command") != "train":
        raise OptionError(f"{run} was not made by lorasmith train; start its workflow or script again to resume it")
    if steps is not None:
        _check_longer(run, folder, record, steps)
    elif folder.is_done:
        raise OutputError(
            f"the run in {run} is complete and cannot be resumed; to train on from its end, give the steps of "
            "the longer run with --steps"
        )
    try:
        spec = repeated(
            record,
            run / RECORD,
            rights,
            model=model,
            text_encoders=text_encoders,
            vae=vae,
            data=data,
            device=device,
        )
    except ValueError as error:
        raise TrainingError(f"{run / RECORD} is damaged ({error}); restore it from a copy, or train again") from error
    if steps is not None:
        # Not the path of the record: the folder may have been moved.
        spec = spec.with_settings(steps=steps, existing_state=str(folder.states().paths()[0].resolve()))
    prepared = prepare(spec, output=run if steps is None else None, runs=RUNS, on_event=on_event)
    tracker = record.asked.get("track")
    if spec.config.is_default("track") and tracker in options_of(TrainConfig)["track"].choices[1:]:
        on_event(Warned(message=f"The tracker {tracker} of this run is not started; --track {tracker} starts it."))
    if steps is None and not folder.states().paths():
        on_event(Warned(message=f"{run} ended before its first run state was saved and starts from the beginning."))
    return prepared


def _check_longer(run: Path, folder: RunFolder, record: RunRecord, steps: int) -> None:
    """Raise OptionError unless the run in a folder is complete, has its last state, and is shorter."""
    if not folder.is_done:
        raise OptionError(f"--steps is for a complete run, and that in {run} is not; resume it without --steps first")
    if not folder.states().paths():
        raise OptionError(f"{run} has no run state to continue from; train again with --existing-lora and its LoRA")
    before = record.config.get("steps")
    if isinstance(before, int) and steps <= before:
        raise OptionError(
            f"--steps must be more than the {count_text(before, 'step')} of the run in {run}, got {steps}"
        )
