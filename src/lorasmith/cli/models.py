"""`lorasmith models`: the models in ComfyUI's folders, and the parts that they have."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorasmith.cli.console import console, echo, heading, print_result
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, folders_of

if TYPE_CHECKING:
    from lorasmith.runs.model_list import KnownModel, ListedFile, ListedModel, ModelList


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("models")(models)


def models(
    known: Annotated[
        bool, typer.Option("--known", help="List the model families that can be trained instead, with their files.")
    ] = False,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """List the models in the base folder by family, and the parts that each has or lacks.

    Files are recognised by their tensors; only their headers are read. `lorasmith train` and `generate` take the parts
    that are listed here if none are given.
    """
    if known:
        _print_known()
        return
    from lorasmith.runs.model_list import list_models

    with console.status("Reading headers"):
        found = list_models(folders_of(base_dir, extra_model_paths))
    print_result(lambda: _plain(found), lambda: _print(found))


def _print_known() -> None:
    from lorasmith.runs.model_list import known_models

    with console.status("Reading the families"):
        families = known_models()
    print_result(lambda: [dataclasses.asdict(one) for one in families], lambda: console.print(_table(families)))


def _table(families: list[KnownModel]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, width in {"Model": 16, "Weights": 7, "Text encoders": 26, "Autoencoder": 14, "Side": 7}.items():
        table.add_column(title, width=width, overflow="fold")
    for one in families:
        encoders = ", ".join(_stem(part.usual_file) for part in one.text_encoders)
        weights, side = f"{one.parameters / 1e9:.1f} B", f"{one.defaults.resolution} px"
        table.add_row(one.title, weights, encoders, _stem(one.autoencoder.usual_file), side)
    return table


def _stem(usual_file: str) -> str:
    return usual_file.replace(".safetensors", "")


def _plain(found: ModelList) -> dict[str, object]:
    whole = [{**dataclasses.asdict(one), "is_whole": one.is_whole} for one in found.models]
    return {**dataclasses.asdict(found), "models": whole}


def _print(found: ModelList) -> None:
    for family, models in itertools.groupby(found.models, key=lambda one: one.family):
        heading(family)
        for model in models:
            echo(f"  {model.path.name} ({_size(model.size_bytes)}{_and(model.precision)}) in {model.place}")
            for line in _parts(model):
                echo(f"    {line}")
    _print_files("Text encoders and autoencoders that fit none of these", found.unused)
    _print_files("Not recognised", found.unknown)


def _parts(model: ListedModel) -> list[str]:
    besides = [part.path.name for part in model.parts if part.path is not None and part.path != model.path]
    if model.is_whole:
        return [f"whole, with {', '.join(besides)}" if besides else "whole"]
    missing = [f"missing: {part.kind} (usually {part.usual_file})" for part in model.missing]
    return [*([f"with {', '.join(besides)}"] if besides else []), *missing]


def _print_files(title: str, files: tuple[ListedFile, ...]) -> None:
    if not files:
        return
    heading(title)
    for file in files:
        details = f" ({_size(file.size_bytes)}, {file.precision})" if file.precision else ""
        echo(f"  {file.path.name}{details} in {file.place}: {file.what}")


def _and(text: str) -> str:
    return f", {text}" if text else ""


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
