"""`lorasmith inspect`: content of a LoRA file."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from lorasmith.cli.console import console, echo, heading, print_note, print_result
from lorasmith.cli.flags import LoraFile

if TYPE_CHECKING:
    from lorasmith.app.state_facts import StateFacts
    from lorasmith.formats.inspect import LoraSummary

_LONGEST = 160  # characters of a metadata value that are shown


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(file: LoraFile) -> None:
    """Show the content of a LoRA file: layout, family, algorithm, ranks, norms, metadata, hashes and faults."""
    from lorasmith.app.state_facts import facts_of_state
    from lorasmith.formats.inspect import describe

    gc.freeze()  # a collection, of which 50,000 tensors cause several, visits a million objects of torch
    if (state := facts_of_state(file)) is not None:
        print_result(lambda: state, lambda: _print_sentences(state))
        return
    summary = describe(file)
    print_result(lambda: summary, lambda: _print(summary))


def _print_sentences(state: StateFacts) -> None:
    for sentence in state.sentences:
        echo(sentence)


def _print(summary: LoraSummary) -> None:
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
    for key, value in entries.items():
        table.add_row(f"  {key}", value if len(value) <= _LONGEST else f"{value[:_LONGEST]} …")
    console.print(table)


def _counts(counted: Mapping[Any, int]) -> str:
    """`kohya: 192` or, of several, `16: 180, 8: 12`."""
    return ", ".join(f"{name} × {count}" for name, count in counted.items()) or "none"
