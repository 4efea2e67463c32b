"""`lorasmith convert`: a LoRA file into another layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import LoraFile, LoraModel

if TYPE_CHECKING:
    from lorasmith.toolbox.convert import Converted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("convert")(convert)


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
    print_result(lambda: done, lambda: _print(done))


def _print(done: Converted) -> None:
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
