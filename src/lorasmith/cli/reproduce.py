"""`lorasmith reproduce`: the run that made a LoRA, once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.console import remark, say
from lorasmith.core.errors import OptionError

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
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: the first GPU, or the CPU.")
    ] = None,
) -> None:
    """Train a LoRA again from what its file says, and compare.

    Says what is not as it was (base model, images, settings, versions). If the run is the same, trains it, and tells
    whether the same tensors came out. Exit status 1 if something that decides the result differs.
    """
    from lorasmith.cli.train import finish, prepare
    from lorasmith.core.options import config_from
    from lorasmith.data.split import split
    from lorasmith.formats.hashes import sha256_body
    from lorasmith.training.config import TrainConfig
    from lorasmith.training.fingerprint import differences
    from lorasmith.training.records import run_record

    before = _run_of(lora)
    elsewhere = {"model": model, "folder": data and str(data.resolve())}
    source = before["source"] | {key: value for key, value in elsewhere.items() if value}
    prepared = prepare(source, config_from(TrainConfig, before["asked"]), device)
    job = prepared.job
    parts = split(prepared.data, share=job.config.validation_share, given=prepared.validation)
    now = run_record(job, parts, title=source["name"], source=source, device=prepared.device)
    for found in differences(before["environment"], now["environment"]):
        remark(f"not as it was: {found}; the last bits may differ.", kind="Differs")
    decisive = differences(before["fingerprint"], now["fingerprint"])
    for found in decisive:
        remark(f"not as it was: {found}; the result will be another one.", kind="Differs")
    if decisive:
        raise typer.Exit(1)
    if dry_run:
        say("Base model, images, settings and initial weights are as they were.")
        return
    result = finish(prepared, output=output, fresh=True)
    if result.path is None or result.reason == "cancelled":
        raise typer.Exit(1)
    same = sha256_body(result.path) == sha256_body(lora)
    say(f"\nThe tensors of {result.path} and {lora} are {'the same, to the bit' if same else 'not the same'}.")
    if not same:
        raise typer.Exit(1)


def _run_of(lora: Path) -> dict[str, Any]:
    """What a file says of the run that made it. Raises LoraError and OptionError."""
    from lorasmith.formats.container import check_safetensors
    from lorasmith.training.records import RUN_ENTRY

    metadata = check_safetensors(lora).metadata
    if RUN_ENTRY not in metadata:
        raise OptionError(
            f"{lora} does not say how it was made: it is another program's, was saved with --private, or its metadata "
            "was taken out; train it again from its images"
        )
    run: dict[str, Any] = json.loads(metadata[RUN_ENTRY])
    if run["source"].get("command") != "train":
        remedy = "the workflow in its metadata" if "prompt" in metadata else "the script that made it"
        raise OptionError(f"{lora} was not made by lorasmith train; run {remedy} again to reproduce it")
    return run
