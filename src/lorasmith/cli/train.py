"""`lorasmith train`: a folder of images in, a LoRA out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.flags import AnyBaseModel, Device, RunOutput, with_flags
from lorasmith.cli.run_output import preparation, train_and_say
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=train.__doc__)(
        with_flags(train, options_of(TrainConfig), aliases={"training_dtype": "--dtype"})
    )


def train(
    folder: Annotated[Path, typer.Argument(help="Folder of images (png, jpg, ...), with captions in .txt files.")],
    model: AnyBaseModel = None,
    trigger: Annotated[
        str, typer.Option(help="Phrase that will call the subject or style; put in front of captions that lack it.")
    ] = "",
    resolution: Annotated[
        int | None,
        typer.Option(help="Side in pixels of the square whose area pictures are scaled to. Left out: the model's own."),
    ] = None,
    output: RunOutput = None,
    name: Annotated[str | None, typer.Option(help="Name of the LoRA; the images' folder's if left out.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of images to judge the LoRA by, instead of a share of the images.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, even if this run was broken off before and could go on.")
    ] = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Train a LoRA on a folder of images.

    Captions are read from text files of the same name; pictures without one get the trigger. Says what it will do,
    trains, and ends with the LoRA, a report and the folder of the run. Ctrl-C saves what there is; the same command
    goes on from there.
    """
    from lorasmith.app.folder_run import FolderSource, absolute, prepare

    config = TrainConfig(**settings)
    if config.existing_lora is not None:
        config = replace(config, existing_lora=absolute(config.existing_lora))
    if model is None:
        raise OptionError(_which_models())
    source = FolderSource.of(
        folder,
        model,
        config,
        name=name,
        trigger=trigger,
        resolution=resolution,
        validation=validation,
        device=device,
    )
    with preparation() as show:
        prepared = prepare(source, config, on_event=show)
    train_and_say(prepared, output=output, fresh=fresh)


def _which_models() -> str:
    from lorasmith.core.folders import Folders

    found = Folders.load(Path.cwd()).files("checkpoints")
    return (
        "--model must say what to train on: a .safetensors checkpoint, a diffusers folder or a hub id; here are "
        f"{', '.join(found)}; --model lorasmith-tiny is a small model for trying things out"
    )
