"""A complete run that is started again with more steps: the longer run starts from its end, in the same folder.

    out/          the longer run; its record names the run state below as `existing_state`
    out-old-1/    the whole folder of the shorter one

If the longer run is interrupted and started again, it is resumed, although only its record has that setting.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePath

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.printable import count_text
from lorasmith.training.events import EventHandler, Warned
from lorasmith.training.storage.fingerprint import Fingerprint, differences, state_digest
from lorasmith.training.storage.records import RunRecord
from lorasmith.training.storage.run_folder import RunFolder, check_verifiable
from lorasmith.training.storage.run_states import load_state

_STATE = "existing_state"


def continuing(folder: RunFolder, record: RunRecord, on_event: EventHandler) -> RunRecord:
    """The record of a run in a folder that holds a run: starting from the end of that one, if it is shorter.

    The shorter run's folder, which is claimed, is moved aside, with a `Warned`. If the folder holds another run,
    `record` is unchanged. Raises OutputError if the run there is complete and not shorter, unreadable or immovable,
    OptionError without a run state.
    """
    if record.config.get(_STATE) is not None:  # which names what to start from
        return record
    before = folder.record()
    steps, given = before.config.get("steps"), record.config.get("steps")
    if differences(_without_length(before.fingerprint), _without_length(record.fingerprint)):
        return record
    if not isinstance(steps, int) or not isinstance(given, int):
        return record
    if given == steps or not folder.is_done:
        return _with_its_state(folder, before, record)
    _check_longer(folder, steps, given)
    check_verifiable(before, record.fingerprint, folder.path)
    newest = folder.states().paths()[0]
    load_state(newest)  # a damaged one is refused before anything is moved
    aside = folder.move_aside()
    on_event(Warned(message=f"The complete run in {folder.path} was moved to {aside}; this one starts from its end."))
    return _from_state(record, (aside / "states" / newest.name).resolve())


def _check_longer(folder: RunFolder, steps: int, given: int) -> None:
    """Raise unless the complete run in a folder has a state, and fewer `steps` than `given`."""
    if given <= steps:
        raise OutputError(
            f"{folder.path} holds this run, which is complete with {count_text(steps, 'step')}, and {given} were "
            "given; give more steps to train on from its end, choose another output, or start fresh, which moves it "
            "aside"
        )
    if not folder.states().paths():
        raise OptionError(
            f"{folder.path} has no run state to continue from; choose another output, and train again with its LoRA as "
            "existing_lora"
        )


def _with_its_state(folder: RunFolder, before: RunRecord, record: RunRecord) -> RunRecord:
    """The record with the state that the run in the folder started from, if it started from one."""
    path = before.config.get(_STATE)
    if not isinstance(path, str):
        return record
    # Looked up beside the folder, as both may have been moved; paths of an untrusted record are not opened.
    parts = PurePath(path).parts[-3:]
    if len(parts) < 3 or ".." in parts:
        return record
    found = folder.path.resolve().parent.joinpath(*parts)
    if folder.states().paths():  # it continues from these
        initial = before.fingerprint.get("initial", "")
        return _starting(record, found, initial)
    try:
        return _from_state(record, found)
    except OutputError:
        return record


def _from_state(record: RunRecord, path: Path) -> RunRecord:
    return _starting(record, path, record.fingerprint.get("initial", "") + state_digest(path))


def _starting(record: RunRecord, path: Path, initial: str) -> RunRecord:
    whole: Fingerprint = {**record.fingerprint, "initial": initial}
    setting = {_STATE: str(path)}
    return replace(record, config={**record.config, **setting}, asked={**record.asked, **setting}, fingerprint=whole)


def _without_length(fingerprint: Fingerprint) -> Fingerprint:
    """A fingerprint without the number of steps and the run state that it started from."""
    config = {name: value for name, value in fingerprint.get("config", {}).items() if name != "steps"}
    return {**fingerprint, "config": config, "initial": fingerprint.get("initial", "").partition("+")[0]}
