"""`lorasmith resume`: go on with a run that was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.core.errors import OptionError, OutputError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resume")(resume)


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run, such as runs/dog-001.")],
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: the first GPU, or the CPU.")
    ] = None,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint.

    With the same versions, device and number of threads the result is, to the bit, that of a run that was never
    stopped; what differs is said.
    """
    from lorasmith.cli.train import finish, prepare
    from lorasmith.core.options import config_from
    from lorasmith.training.config import TrainConfig
    from lorasmith.training.run_folder import DONE, RunFolder

    folder = RunFolder(run)
    record = folder.record()
    source = record.get("source") or {}
    if folder.outcome() in DONE:
        raise OutputError(f"{run} is done, so that there is nothing to go on with; train again for another run")
    if source.get("command") != "train":
        raise OptionError(
            f"{run} was not made by lorasmith train; start its workflow or script again, which goes on with it"
        )
    finish(prepare(source, config_from(TrainConfig, record["asked"]), device), output=run, fresh=False)
