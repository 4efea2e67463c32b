"""`lorasmith resume`: continue an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.flags import AllowOptimizer, AsRecorded, DataNow, ModelNow, TextEncodersNow, TrackNow, VaeNow, Verify
from lorasmith.cli.run_output import preparation_shown, train_and_report
from lorasmith.cli.together import together


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resume")(resume)


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run, such as runs/dog-001.")],
    model: ModelNow = None,
    text_encoder: TextEncodersNow = None,
    vae: VaeNow = None,
    data: DataNow = None,
    device: Annotated[
        str | None, typer.Option(help="Device to train on, such as cuda or cpu. Default: that of the run.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Train on from the end of this run, which is complete, up to so many steps, in a folder of its own."
        ),
    ] = None,
    as_recorded: AsRecorded = False,
    allow_optimizer: AllowOptimizer = None,
    track: TrackNow = None,
    verify: Verify = False,
) -> None:
    """Continue a run that was stopped or killed, from its last run state.

    With the same versions, device and number of threads the result is bit-identical to that of an uninterrupted run;
    differences are reported. Other images, other settings or another base model are refused.
    """
    from lorasmith.app.recorded_run import Rights
    from lorasmith.app.resume import prepare_again

    rights = Rights(files=as_recorded, optimizers=tuple(allow_optimizer or ()), track=track)
    with together():
        with preparation_shown() as show:
            prepared = prepare_again(
                run,
                rights=rights,
                model=model,
                text_encoders=text_encoder or (),
                vae=vae,
                data=data,
                device=device,
                steps=steps,
                on_event=show,
            )
        train_and_report(prepared, output=run if steps is None else None, verify=verify)
