"""`lorasmith resize`: reduce the rank of a LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.core.printable import count_text

if TYPE_CHECKING:
    from lorasmith.toolbox.resize import Resized


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("resize")(resize)


def resize(
    file: Annotated[Path, typer.Argument(help="A LoRA file, in any layout.")],
    rank: Annotated[int | None, typer.Option(help="Maximum rank.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each module's squared singular values to keep, such as 0.95; ranks then differ."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The new file. Default: beside FILE, with the size in its name.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Its model, for LoHa and LoKr on convolutions, whose files lack the kernel size."),
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module instead of blocks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --output.")] = False,
) -> None:
    """Reduce the rank of a LoRA, with the best approximation of each module's weight change.

    The scale of each module (alpha / rank) is kept. LoHa, LoKr and full differences become LoRAs.
    """
    from lorasmith.toolbox.model_files import open_model
    from lorasmith.toolbox.resize import resize as run

    size = [f"rank{rank}"] * (rank is not None) + ([] if energy is None else [f"energy{energy:g}"])
    target = output or file.with_name(f"{file.stem}-{'-'.join(size)}.safetensors")
    with console.status("Resizing"):
        names = None if model is None else open_model(model).names
        report = run(file, target, rank=rank, energy=energy, names=names, overwrite=overwrite)

    def show() -> None:
        _print(report.modules, one_by_one=modules)
        for warning in report.warnings:
            print_note(warning)
        echo(f"{count_text(len(report.modules), 'module')} kept {report.energy:.2%} of the energy in all")
        echo(report.output)

    print_result(lambda: {**vars(report), "energy": report.energy}, show)


def _print(modules: Iterable[Resized], *, one_by_one: bool) -> None:
    from rich.table import Table

    from lorasmith.formats.names.recognise import block_of, component_of

    groups: dict[str, list[Resized]] = {}
    for one in modules:
        block = ".".join(part for part in (component_of(one.name), block_of(one.name)) if part)
        groups.setdefault(one.name if one_by_one else block, []).append(one)
    table = Table("module" if one_by_one else "block", "rank before", "rank now", "energy kept", box=None)
    for name, group in groups.items():
        total = sum(one.total for one in group)
        energy = sum(one.kept for one in group) / total if total else 1.0
        before = [one.before for one in group if one.before is not None]
        table.add_row(name, _range(before), _range([one.after for one in group]), f"{min(energy, 1.0):.2%}")
    console.print(table)


def _range(ranks: list[int]) -> str:
    """`8`, or `2 to 8`."""
    if not ranks:
        return "none"
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
