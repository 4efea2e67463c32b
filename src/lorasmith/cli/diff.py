"""`lorasmith diff`: differences of two LoRAs, or two models."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, echo, end_with, print_result
from lorasmith.core.errors import LorasmithError

if TYPE_CHECKING:
    from lorasmith.toolbox.compare import Comparison, Pair

_SHOWN = 5  # entries of a list
_LONGEST = 60  # characters of a metadata value


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("diff")(diff)


def diff(
    first: Annotated[Path, typer.Argument(help="A LoRA in any layout, or a model.")],
    second: Annotated[Path, typer.Argument(help="The LoRA or model to compare with.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model of two LoRAs: for layouts that name modules differently, and for DoRA, OFT and such."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative distance up to which two changes of a weight count as the same.")
    ] = 1e-6,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Ignore ranks, alphas, algorithms, dtypes and metadata.")
    ] = False,
) -> None:
    """Compare two LoRAs, or two models: their weight changes by module, and their metadata.

    The exit status is 0 if they are the same, 1 if they differ and 2 if they cannot be compared.
    """
    from lorasmith.toolbox.compare import compare
    from lorasmith.toolbox.model_files import open_model

    try:
        with console.status("Comparing"):
            found = compare(first, second, model=None if model is None else open_model(model))
    except LorasmithError as error:
        end_with(error, 2)
    same = found.is_same(tolerance=tolerance, weights_only=weights_only)
    print_result(lambda: {"same": same, **_plain(found)}, lambda: _print(found, first, second, same=same))
    raise typer.Exit(0 if same else 1)


def _plain(found: Comparison) -> dict[str, Any]:
    """Infinite distances become null."""

    def numbers(pair: Pair) -> dict[str, Any]:
        return {"name": pair.name, "distance": pair.distance, "cosine": pair.cosine}

    return {
        **dataclasses.asdict(found),
        "pairs": [numbers(pair) for pair in found.pairs],
        "blocks": [numbers(pair) for pair in found.blocks()],
        "overall": numbers(found.overall()),
    }


def _print(found: Comparison, first: Path, second: Path, *, same: bool) -> None:
    from rich.table import Table

    unit = "modules" if found.kind == "LoRA" else "tensors"
    for path, names in ((first, found.only_first), (second, found.only_second)):
        if names:
            echo(f"Only in {path}: {len(names)} {unit}, such as {_some(names)}")
    counts = collections.Counter(found.settings.values())
    for (one, other), count in counts.most_common(_SHOWN):
        example = next(name for name, both in found.settings.items() if both == (one, other))
        echo(f"{count} {unit}, such as {example}: {one} against {other}")
    if found.by_tensors:
        echo(f"{found.by_tensors} modules were compared by their tensors; --model compares their effect")
    if found.overall().apart:
        table = Table("block", "distance", "cosine", box=None)
        for pair in (*found.blocks(), found.overall()):
            cosine = "none" if pair.cosine is None else f"{pair.cosine:.4f}"
            table.add_row(pair.name, f"{pair.distance:.3g}", cosine)
        console.print(table)
    for key, values in found.metadata.items():
        one, other = ("(none)" if value is None else _short(value) for value in values)
        echo(f"Metadata {key}: {one} against {other}")
    echo(f"{len(found.pairs)} {unit} in both: " + ("the same" if same else "different"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN])


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} …"
