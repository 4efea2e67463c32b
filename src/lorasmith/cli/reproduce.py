"""`lorasmith reproduce`: the run that made a LoRA, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import remark, say
from lorasmith.cli.flags import DataNow, ModelNow, RunOutput
from lorasmith.cli.run_output import preparation, say_result, training

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    lora: Annotated[Path, typer.Argument(help="A LoRA that Lorasmith trained.")],
    model: ModelNow = None,
    data: DataNow = None,
    output: RunOutput = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what differs; train nothing.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: as for the LoRA.")
    ] = None,
) -> None:
    """Train a LoRA again from what its file says, and compare.

    Says what is not as it was (base model, images, settings, versions). If the run is the same, trains it, and tells
    whether the same tensors came out. Exit status 1 if something that decides the result differs, or the result does.
    """
    from lorasmith.app import reproduce as app
    from lorasmith.training.events import Event

    with preparation() as show:
        again = app.prepare_reproduction(lora, model=model, data=data, output=output, device=device, on_event=show)
    planned = again.prepared.job.config.steps
    if again.steps < planned:  # cancelled, stopped early, or the best on the way
        say(f"{lora.name} is of step {again.steps} of {planned}, so that training ends there.")
    with training() as (show, cancelled):

        def told(event: Event) -> None:
            if isinstance(event, app.Differs):
                follows = "the result would be another" if event.is_decisive else "the last bits may be others"
                remark(f"{event.what}, so that {follows}.", kind="Differs")
            else:
                show(event)

        found = app.reproduce(again, dry_run=dry_run, on_event=told, cancelled=cancelled)
    if found.differs:
        raise typer.Exit(1)
    if found.result is None:
        say("Base model, images, settings and initial weights are as they were.")
        return
    say_result(found.result)
    if not found.is_complete:
        raise typer.Exit(1)
    same = "the same, to the bit" if found.is_same else "not the same"
    say(f"\nThe tensors of {found.result.path} and {lora} are {same}.")
    if not found.is_same:
        raise typer.Exit(1)
