"""`lorasmith inspect`, `check` and `convert`: content, faults and layout of a LoRA file."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, echo, heading, print_note, print_result
from lorasmith.cli.flags import LoraFile, LoraModel

if TYPE_CHECKING:
    from lorasmith.formats.faults import Finding
    from lorasmith.formats.inspect import LoraSummary
    from lorasmith.runs.recorded_run import StateFacts
    from lorasmith.toolbox.check import Checked
    from lorasmith.toolbox.convert import Converted

_MOST_ROWS = 500  # of a table
_LONGEST = 160  # characters of a metadata value that are shown


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("inspect")(inspect)
    app.command("check")(check)
    app.command("convert")(convert)


def inspect(file: LoraFile) -> None:
    """Show the content of a LoRA file: layout, family, algorithm, ranks, norms, metadata, hashes and faults."""
    from lorasmith.formats.inspect import describe
    from lorasmith.runs.recorded_run import facts_of_state

    gc.freeze()  # a collection, of which 50,000 tensors cause several, visits a million objects of torch
    if (state := facts_of_state(file)) is not None:
        print_result(lambda: state, lambda: _print_sentences(state))
        return
    summary = describe(file)
    print_result(lambda: summary, lambda: _print_summary(summary))


def _print_sentences(state: StateFacts) -> None:
    for sentence in state.sentences:
        echo(sentence)


def _print_summary(summary: LoraSummary) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = {
        "File": f"{summary.path} ({summary.size_bytes / 2**20:.1f} MiB)",
        "Layout": _counts(summary.layouts),
        "Family": summary.family or "not recognised",
        "Algorithm": _counts(summary.algorithms),
        **({"DoRA": f"magnitudes per {_counts(summary.magnitudes)}"} if summary.magnitudes else {}),
        "Modules": _counts(summary.components),
        "Layers": _counts(summary.layers),
        **{
            label: _counts(found)
            for label, found in {
                "Rank": summary.ranks,
                "Factor": summary.factors,
                "Block size": summary.block_sizes,
            }.items()
            if found
        },
        "Alpha": _counts({"none" if alpha is None else f"{alpha:g}": n for alpha, n in summary.alphas.items()}),
        "Tensors": f"{summary.tensors} ({_counts(summary.dtypes)}), {summary.parameters:,} parameters",
        "Steps": str(summary.steps or "not recorded"),
        **{name.upper(): value for name, value in summary.hashes.items()},
    }
    table = Table.grid(padding=(0, 2))
    for label, text in rows.items():
        table.add_row(Text(label, style="bold"), text)
    console.print(table)
    _print_section(
        "Norm of the weight change by block, at strength 1", {k: f"{v:.4g}" for k, v in summary.norms.items()}
    )
    _print_section("Metadata", summary.metadata)
    for finding in summary.findings:
        print_note(f"{finding}; `lorasmith check` shows the remedy", kind="Fault")


def _print_section(title: str, entries: Mapping[str, str]) -> None:
    from rich.table import Table

    if not entries:
        return
    echo()
    heading(title)
    table = Table.grid(padding=(0, 2))
    for key, value in itertools.islice(entries.items(), _MOST_ROWS):
        table.add_row(f"  {key}", value if len(value) <= _LONGEST else f"{value[:_LONGEST]} …")
    console.print(table)
    if len(entries) > _MOST_ROWS:
        echo(f"  and {len(entries) - _MOST_ROWS:,} more; --json has all")


def _counts(counted: Mapping[Any, int]) -> str:
    """`kohya: 192` or, of several, `16: 180, 8: 12`."""
    shown = ", ".join(f"{name} × {count}" for name, count in itertools.islice(counted.items(), _MOST_ROWS)) or "none"
    return shown if len(counted) <= _MOST_ROWS else f"{shown}, and {len(counted) - _MOST_ROWS:,} more"


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
    print_result(lambda: _plain_checked(checked) | written, lambda: _print_checked(checked, fix, mended))
    if not checked.is_fine:
        raise typer.Exit(1)


def _print_checked(checked: Checked, fix: Path | None, mended: int | None) -> None:
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


def _plain_checked(checked: Checked) -> dict[str, object]:
    findings = [
        {"problem": one.problem, "remedy": one.remedy, "is_fault": one.is_fault, "can_be_mended": one.mend is not None}
        for one in checked.findings
    ]
    names = (field.name for field in dataclasses.fields(checked) if field.name not in ("names", "is_model_sure"))
    fields = {name: getattr(checked, name) for name in names}
    return {**fields, "path": str(checked.path), "findings": findings, "is_fine": checked.is_fine}


def convert(
    file: LoraFile,
    to: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="kohya, comfy, diffusers, peft (a folder), or portable: the one that most programs apply completely.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The new file or folder. Default: beside FILE, with the layout in its name.")
    ] = None,
    model: LoraModel = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Convert what can be converted, and report what is lost.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Leave paths, prompts, captions and workflow out of the metadata.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Convert a LoRA into another layout, with the same effect.

    Layers of text encoders are converted too. A LoRA that the layout cannot represent is refused unless --lossy is
    given. Only module names of the model are read.
    """
    from lorasmith.toolbox.convert import convert_lora

    target = output or _beside(file, to)
    with console.status("Converting"):
        done = convert_lora(file, to, target, model, lossy, private=private, overwrite=overwrite)
    print_result(lambda: done, lambda: _print_converted(done))


def _print_converted(done: Converted) -> None:
    for sentence in done.losses:
        print_note(sentence, kind="Lost")
    for sentence in done.notes:
        print_note(sentence)
    echo(f"{done.modules} modules in the layout of {done.layout}")
    echo(done.path)


def _beside(file: Path, layout: str) -> Path:
    """`dog-comfy.safetensors` for `dog.safetensors`, and a folder for PEFT."""
    from lorasmith.formats.layouts.layout import LAYOUTS
    from lorasmith.formats.lora_file import PORTABLE

    name = PORTABLE if layout.casefold() == PORTABLE else LAYOUTS.canonical(layout)
    stem = file.name if file.is_dir() else file.stem
    return file.with_name(f"{stem}-{name}" + ("" if name in LAYOUTS and LAYOUTS[name].in_folder else ".safetensors"))
