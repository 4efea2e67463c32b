"""`lorasmith merge`: several LoRAs into one, or into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import split_strength
from lorasmith.core.errors import OptionError

if TYPE_CHECKING:
    from lorasmith.toolbox.merge import MergeReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge")(merge)


def merge(
    loras: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]", help="LoRAs in any layout, such as my.safetensors:0.8.")
    ],
    output: Annotated[Path, typer.Option(help="The new file, or a folder for --into with a diffusers folder.")],
    rank: Annotated[
        int | None, typer.Option(help="Maximum rank, by singular value decomposition. Default: no truncation.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Merge the LoRAs into a copy of this model instead.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the LoRAs: for different layouts and, with --rank, for DoRA, OFT and such."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, bf16 or fp16. Default: that of the LoRAs, or fp32 if it would round."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Merge LoRAs into one, each at its strength, or into a model.

    Without --rank the merged LoRA is the exact sum of its parts: their ranks add up.
    """
    from lorasmith.core.placement import dtype_from_name

    parts = [split_strength(text) for text in loras]
    if into is not None:
        unused = {"--rank": rank, "--model": model, "--dtype": dtype}
        if given := [flag for flag, value in unused.items() if value is not None]:
            raise OptionError(f"--into merges into the model, where {' and '.join(given)} has no effect; leave it out")
        _into(into, parts, output, overwrite=overwrite)
        return
    number_format = None if dtype is None else dtype_from_name(dtype)
    from lorasmith.toolbox.merge import merge_loras
    from lorasmith.toolbox.model_files import open_model

    with console.status("Merging"):
        base = None if model is None else open_model(model)
        report = merge_loras(parts, output, rank=rank, model=base, dtype=number_format, overwrite=overwrite)
    print_result(lambda: report, lambda: _print(report))


def _print(report: MergeReport) -> None:
    _warn_left_out(report.left_out)
    ranks = ", ".join(f"{rank} × {count}" for rank, count in sorted(report.ranks.items(), reverse=True))
    kept = "exact" if report.energy is None else f"{report.energy:.2%} of the energy of truncated modules"
    echo(f"{report.modules} modules, rank {ranks or 'none'}: {kept}")
    echo(report.output)


def _warn_left_out(left_out: Mapping[Path, Sequence[str]]) -> None:
    """Print which tensors of each file were left out."""
    for path, names in left_out.items():
        text = f"{len(names)} tensors of {path}, such as {names[0]}, match no module of the model and are left out"
        print_note(text)


def _into(model: str, parts: Sequence[tuple[Path, float]], output: Path, *, overwrite: bool) -> None:
    from lorasmith.toolbox.fold import fold_into
    from lorasmith.toolbox.model_files import open_model

    with console.status(f"Merging into {model}"):
        report = fold_into(open_model(model), parts, output, overwrite=overwrite)

    def show() -> None:
        _warn_left_out(report.left_out)
        for name in report.skipped:
            print_note(f"{name} is not in the new folder, because it holds the same weights without the LoRAs")
        echo(f"{report.modules} modules changed")
        echo(report.output)

    print_result(lambda: report, show)
