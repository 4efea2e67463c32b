"""`lorasmith resume`: go on with a run that was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.flags import DataNow, ModelNow
from lorasmith.cli.run_output import preparation, train_and_say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resume")(resume)


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run, such as runs/dog-001.")],
    model: ModelNow = None,
    data: DataNow = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: as when the run began.")
    ] = None,
) -> None:
    """Go on with a run that was stopped or killed, from its last saved state.

    With the same versions, device and number of threads the result is, to the bit, that of a run that was never
    stopped; what differs is said. Other images, settings or another base model are refused.
    """
    from lorasmith.app.resume import prepare_again

    with preparation() as show:
        prepared = prepare_again(run, model=model, data=data, device=device, on_event=show)
    train_and_say(prepared, output=run)
