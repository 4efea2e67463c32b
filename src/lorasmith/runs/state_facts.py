"""Facts of a run state, for users who open it as a LoRA."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import LorasmithError
from lorasmith.runs.command_lines import resume_command
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.storage.run_states import is_state, load_state


@dataclass(frozen=True)
class StateFacts:
    """A run state."""

    path: Path
    step: int  # updates taken
    steps: int | None  # of the run; None if unknown
    lora: Path | None  # the LoRA of its run, if any
    command: str | None  # continues the run and saves a LoRA; None if there is nothing to continue

    @property
    def sentences(self) -> tuple[str, ...]:
        """What it is, and how to make a LoRA of it."""
        of = "" if self.steps is None else f" of {self.steps:,}"
        what = f"{self.path} is the state of a run at step {self.step:,}{of}, from which it continues. It is no LoRA."
        found = () if self.lora is None else (f"The LoRA of the run is {self.lora}.",)
        if self.command is None:
            return (what, *found)
        how = "To make a LoRA of the newest state, continue the run; Ctrl-C ends it at any step and saves the LoRA:"
        return (what, *found, how, f"  {self.command}")


def facts_of_state(path: Path) -> StateFacts | None:
    """The facts of a run state; None if the file is something else. OutputError if the state is damaged."""
    try:
        if not path.is_file() or not is_state(path):
            return None
    except LorasmithError:  # unreadable; those who read it as a LoRA report that
        return None
    state = load_state(path)
    config = state.numbers.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    run, lora, command = path.resolve().parent.parent, None, None
    with contextlib.suppress(LorasmithError):
        folder = RunFolder(run)
        lora = run / f"{folder.record().title}.safetensors"
        command = None if folder.is_done else resume_command(run)
    return StateFacts(
        path, state.step, steps if isinstance(steps, int) else None, lora if lora and lora.is_file() else None, command
    )
