"""`lorasmith resume`: go on with a run that was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import remark
from lorasmith.core.errors import OptionError, OutputError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resume")(resume)


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run, such as runs/dog-001.")],
    model: Annotated[str | None, typer.Option(help="The base model, if it is elsewhere now.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of images, if it is elsewhere now.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: as when the run began.")
    ] = None,
) -> None:
    """Go on with a run that was stopped or killed, from its last saved state.

    With the same versions, device and number of threads the result is, to the bit, that of a run that was never
    stopped; what differs is said. Other images, settings or another base model are refused.
    """
    from lorasmith.cli.train import asked_again, finish, prepare
    from lorasmith.training.runs.run_folder import RunFolder

    folder = RunFolder(run)
    record = folder.record()
    if (record.get("source") or {}).get("command") != "train":
        raise OptionError(
            f"{run} was not made by lorasmith train; start its workflow or script again, which goes on with it"
        )
    if folder.is_done:
        raise OutputError(f"{run} is done, so that there is nothing to go on with; train again for another run")
    folder.check_free()
    prepared = prepare(*asked_again(record, model=model, data=data, device=device))
    if not folder.states().paths():
        remark(f"{run} ended before its first state was saved, so it begins again.")
    finish(prepared, output=run, fresh=False)
