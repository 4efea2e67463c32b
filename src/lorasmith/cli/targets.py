"""`lorasmith targets`: summary of a choice of target layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import BaseDir, BaseModel, ExtraModelPaths, folders_of, with_flags
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.training.targets_summary import TargetGroup, TargetSummary

_NAMES = ("targets", "algorithm", "rank", "alpha", "differences", "dora", "pissa", "tucker", "lora_dtype")


def register(app: typer.Typer) -> None:
    """Add the command."""
    options = {name: one for name, one in options_of(TrainConfig).items() if name in _NAMES}
    app.command("targets", help=targets.__doc__)(with_flags(targets, options))


def targets(
    model: BaseModel,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Summarise a choice of target layers: kinds of layers, counts, ranks, parameters, size of the file.

    Takes the options of `lorasmith train` that affect it. Only the structure of a single-file checkpoint is read.
    """
    from lorasmith.families.loading import load_structure
    from lorasmith.families.model_search import MODEL_FOLDERS, in_folders
    from lorasmith.training.targets_summary import summarise_targets

    config = TrainConfig(**settings)
    with console.status(f"Reading {model}"):
        base = load_structure(in_folders(model, folders_of(base_dir, extra_model_paths), MODEL_FOLDERS))
    preview = summarise_targets(base.denoiser, config)
    print_result(lambda: preview, lambda: _print(preview, config))


def _print(preview: TargetSummary, config: TrainConfig) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    rank = ALGORITHMS[config.algorithm].rank_meaning
    rated = any(group.learning_rate is not None for group in preview.groups)
    scaled = any(group.alpha is not None for group in preview.groups)
    columns = ["Layers", "Kind", "Count", rank.capitalize(), "Alpha" * scaled, "Rate" * rated, "Parameters"]
    for name in filter(None, columns):
        table.add_column(name, justify="left" if name in ("Layers", "Kind") else "right", no_wrap=True)
    for group in preview.groups:
        cells = [group.name, group.layer, str(group.count)]
        cells += [_range(group)] if rank else []
        cells += [_number(group.alpha)] if scaled else []
        cells += [_number(group.learning_rate)] if rated else []
        table.add_row(*cells, f"{group.parameters:,}")
    echo(f"{config.algorithm} on {preview.targets}")
    console.print(table)
    echo(
        f"{preview.layers} of {preview.targetable} layers, {preview.parameters:,} parameters, "
        f"a file of about {preview.size_bytes / 2**20:.1f} MiB in {config.lora_dtype}"
    )
    for note in preview.notes:
        print_note(note)


def _range(group: TargetGroup) -> str:
    low, high = group.ranks
    if not high:
        return ""
    return str(low) if low == high else f"{low}–{high}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
