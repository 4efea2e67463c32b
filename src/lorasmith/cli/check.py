"""`lorasmith check`: faults of a LoRA file."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import LoraFile, LoraModel

if TYPE_CHECKING:
    from lorasmith.formats.faults import Finding
    from lorasmith.toolbox.check import Checked


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    file: LoraFile,
    model: LoraModel = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUTPUT", help="Write a repaired file, as far as faults can be repaired.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at OUTPUT.")] = False,
) -> None:
    """Find faults of a LoRA file, with a remedy for each.

    Checks for NaN and infinity, incomplete adapters, layers without effect, unusual alphas, modules that the model
    lacks, and tensors that other programs do not apply. The exit status is 1 if the file has a fault; differences
    between programs are notes.
    """
    from lorasmith.toolbox.check import check_lora, fix_lora

    gc.freeze()  # as in `inspect`
    with console.status("Checking"):
        checked = check_lora(file, model)
        mended = None if fix is None else fix_lora(checked, fix, overwrite=overwrite)
    written = {} if fix is None else {"fixed": fix, "repaired": mended}
    print_result(lambda: _plain(checked) | written, lambda: _print(checked, fix, mended))
    if not checked.is_fine:
        raise typer.Exit(1)


def _print(checked: Checked, fix: Path | None, mended: int | None) -> None:
    held_to = (
        f"compared with {checked.compared_with}" if checked.compared_with else "not compared with a model (--model)"
    )
    family = f", {checked.family}" if checked.family else ""
    text = f"{checked.path}: {checked.modules} modules in the layout of {checked.layout}{family}; {held_to}"
    echo(text)
    for finding in checked.findings:
        _print_finding(finding)
    if not checked.findings and checked.compared_with is None:
        echo("No faults. Which programs apply all of it, only its model tells: --model MODEL.")
    elif not checked.findings:
        console.print("No faults, and every program applies all of it.")
    elif checked.is_fine:
        console.print("The file itself has no faults.")
    if fix is not None:
        echo(f"{mended} findings repaired in {fix}")


def _print_finding(finding: Finding) -> None:
    kind, colour = ("Fault", "red") if finding.is_fault else ("Note", "yellow")
    print_note(f"{finding.problem}; {finding.remedy}.", kind=kind, colour=colour)


def _plain(checked: Checked) -> dict[str, object]:
    findings = [
        {"problem": one.problem, "remedy": one.remedy, "is_fault": one.is_fault, "can_be_mended": one.mend is not None}
        for one in checked.findings
    ]
    names = (field.name for field in dataclasses.fields(checked) if field.name not in ("names", "is_model_sure"))
    fields = {name: getattr(checked, name) for name in names}
    return {**fields, "path": str(checked.path), "findings": findings, "is_fine": checked.is_fine}
