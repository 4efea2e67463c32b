"""`lorasmith check`: what is wrong with a LoRA file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, remark, say
from lorasmith.cli.flags import AsJson, LoraFile, LoraModel

if TYPE_CHECKING:
    from lorasmith.formats.quality.faults import Finding
    from lorasmith.toolbox.check import Checked

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    file: LoraFile,
    model: LoraModel = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUTPUT", help="Write a file in which everything is mended that can be.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at OUTPUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with a LoRA file, and say how to mend it.

    Values that are not numbers, halves of adapters, layers that change nothing, odd alphas, modules that the model
    lacks, and what programs would not apply of it. The exit status is 1 when the file is at fault; what programs merely
    differ in is a note.
    """
    from lorasmith.toolbox.check import check_lora, fix_lora

    with console.status("Checking"):
        checked = check_lora(file, model)
        mended = None if fix is None else fix_lora(checked, fix, overwrite=overwrite)
    if as_json:
        console.print_json(json.dumps(_plain(checked)))
    else:
        _print(checked)
        if fix is not None:
            console.print(f"{mended} findings mended in", end=" ")
            say(fix)
    if not checked.is_fine:
        raise typer.Exit(1)


def _print(checked: Checked) -> None:
    held_to = (
        f"held to {checked.compared_with}" if checked.compared_with else "not held to any model: name it with --model"
    )
    family = f", {checked.family}" if checked.family else ""
    text = f"{checked.path}: {checked.modules} modules in the layout of {checked.layout}{family}; {held_to}"
    say(text)
    for finding in checked.findings:
        _print_finding(finding)
    if not checked.findings:
        console.print("Nothing is wrong with it, and every program applies all of it.")
    elif checked.is_fine:
        console.print("Nothing is wrong with the file itself.")


def _print_finding(finding: Finding) -> None:
    kind, colour = ("Fault", "red") if finding.is_fault else ("Note", "yellow")
    remark(f"{finding.problem}; {finding.remedy}.", kind=kind, colour=colour)


def _plain(checked: Checked) -> dict[str, object]:
    """What was found, as JSON can carry it."""
    findings = [
        {"problem": one.problem, "remedy": one.remedy, "is_fault": one.is_fault, "can_be_mended": one.mend is not None}
        for one in checked.findings
    ]
    fields = {field.name: getattr(checked, field.name) for field in dataclasses.fields(checked)}
    return {**fields, "path": str(checked.path), "findings": findings, "is_fine": checked.is_fine}
