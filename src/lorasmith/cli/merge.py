"""`lorasmith merge`: several LoRAs into one, or into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, remark, say
from lorasmith.cli.flags import split_strength
from lorasmith.core.errors import OptionError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge")(merge)


def merge(
    loras: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]", help="LoRAs in any layout, such as my.safetensors:0.8.")
    ],
    output: Annotated[Path, typer.Option(help="The new file; a folder for --into with a diffusers folder.")],
    rank: Annotated[
        int | None, typer.Option(help="Rank at most, by singular value decomposition. Left out: everything is kept.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Fold the LoRAs into a copy of this model instead.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model of the LoRAs: for different layouts and, with --rank, for DoRA, OFT and such."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, bf16 or fp16. Left out: that of the LoRAs, or fp32 where it rounds."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Merge LoRAs into one, each at its strength, or fold them into a model.

    Without --rank the merged LoRA does exactly what its parts do together: their ranks add up.
    """
    from lorasmith.core.dtypes import dtype_from_name

    parts = [split_strength(text) for text in loras]
    if into is not None:
        unused = {"--rank": rank, "--model": model, "--dtype": dtype}
        if given := [flag for flag, value in unused.items() if value is not None]:
            raise OptionError(f"--into keeps the model as it is, so {' and '.join(given)} has no meaning; leave it out")
        _into(into, parts, output, overwrite=overwrite)
        return
    number_format = None if dtype is None else dtype_from_name(dtype)
    from lorasmith.toolbox.merge import merge_loras
    from lorasmith.toolbox.model_files import open_model

    with console.status("Merging"):
        base = None if model is None else open_model(model)
        report = merge_loras(parts, output, rank=rank, model=base, dtype=number_format, overwrite=overwrite)
    _warn_left_out(report.left_out)
    ranks = ", ".join(f"{rank} × {count}" for rank, count in sorted(report.ranks.items(), reverse=True))
    kept = "exact" if report.energy is None else f"{report.energy:.2%} of the energy of what was cut down"
    console.print(f"{report.modules} modules, rank {ranks or 'none'}: {kept}", soft_wrap=True)
    say(report.output)


def _warn_left_out(left_out: Mapping[Path, Sequence[str]]) -> None:
    """Say what of each file was not taken along."""
    for path, names in left_out.items():
        text = f"{len(names)} tensors of {path}, such as {names[0]}, belong to no module of the model and are left out"
        remark(text)


def _into(model: str, parts: Sequence[tuple[Path, float]], output: Path, *, overwrite: bool) -> None:
    from lorasmith.toolbox.fold import fold_into
    from lorasmith.toolbox.model_files import open_model

    with console.status(f"Folding into {model}"):
        report = fold_into(open_model(model), parts, output, overwrite=overwrite)
    _warn_left_out(report.left_out)
    for name in report.skipped:
        text = f"{name} is not in the new folder, because it holds the same weights without the LoRAs"
        remark(text)
    console.print(f"{report.modules} modules changed")
    say(report.output)
