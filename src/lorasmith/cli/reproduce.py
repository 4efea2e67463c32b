"""`lorasmith reproduce`: the run that made a LoRA, once more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import remark, say
from lorasmith.core.errors import OptionError, OutputError

if TYPE_CHECKING:
    from lorasmith.cli.train import Prepared

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    lora: Annotated[Path, typer.Argument(help="A LoRA that Lorasmith trained.")],
    model: Annotated[str | None, typer.Option(help="The base model, if it is elsewhere now.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of images, if it is elsewhere now.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a new one under runs/ if left out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what differs; train nothing.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: as for the LoRA.")
    ] = None,
) -> None:
    """Train a LoRA again from what its file says, and compare.

    Says what is not as it was (base model, images, settings, versions). If the run is the same, trains it, and tells
    whether the same tensors came out. Exit status 1 if something that decides the result differs, or the result does.
    """
    from lorasmith.cli.train import asked_again, free_folder, prepare, report, run_prepared
    from lorasmith.formats.container import check_safetensors
    from lorasmith.formats.hashes import sha256_body
    from lorasmith.formats.metadata import steps_of
    from lorasmith.training.runs.run_folder import RunFolder

    metadata = check_safetensors(lora).metadata
    before = _run_of(lora, metadata)
    if output is not None and RunFolder(output).exists:
        raise OutputError(f"{output} holds a run already; choose another output")
    prepared = prepare(*asked_again(before, model=model, data=data, device=device))
    steps, planned = steps_of(metadata, lora.name) - prepared.job.steps_before, prepared.job.config.steps
    if steps < planned:  # cancelled, stopped early, or the best on the way
        say(f"{lora.name} is of step {steps} of {planned}, so that training ends there.")

    def folder_for(fingerprint: Mapping[str, Any]) -> Path:
        if _say_differences(before, fingerprint, prepared):
            raise typer.Exit(1)
        if dry_run:
            say("Base model, images, settings and initial weights are as they were.")
            raise typer.Exit
        return output or free_folder(Path("runs"), prepared.source["name"])

    result = run_prepared(prepared, output=folder_for, fresh=True, until=steps)
    report(result)
    if result.path is None or len(result.losses) < steps:
        raise typer.Exit(1)
    same = sha256_body(result.path) == sha256_body(lora)
    say(f"\nThe tensors of {result.path} and {lora} are {'the same, to the bit' if same else 'not the same'}.")
    if not same:
        raise typer.Exit(1)


def _run_of(lora: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of the run that made it. Raises OptionError."""
    from lorasmith.formats.metadata import RUN_ENTRY

    try:
        run: dict[str, Any] = json.loads(metadata[RUN_ENTRY])
        made_by = run["source"].get("command"), run["asked"], run["environment"], run["fingerprint"]["config"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{lora} does not say how it was made: it is another program's, was saved with --private, or its metadata "
            "was taken out; train it again from its images"
        ) from error
    if made_by[0] != "train":
        remedy = "the workflow in its metadata" if "prompt" in metadata else "the script that made it"
        raise OptionError(f"{lora} was not made by lorasmith train; run {remedy} again to reproduce it")
    return run


def _say_differences(before: Mapping[str, Any], fingerprint: Mapping[str, Any], prepared: Prepared) -> bool:
    """Name what is not as it was; returns whether any of it decides the result."""
    from lorasmith.training.runs.fingerprint import differences, environment, environments_of

    config = prepared.job.config
    now = environment(prepared.device, config.optimizer, compile=config.compile)
    for found in dict.fromkeys(one for there in environments_of(before) for one in differences(there, now)):
        remark(f"{found}, so that the last bits may be others.", kind="Differs")
    decisive = differences(before["fingerprint"], fingerprint)
    for found in decisive:
        remark(f"{found}, so that the result would be another.", kind="Differs")
    return bool(decisive)
