"""`lorasmith train`: a folder of images in, a LoRA out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.flags import (
    AnyBaseModel,
    BaseDir,
    Device,
    ExtraModelPaths,
    RunOutput,
    TextEncoderFiles,
    VaeFile,
    Verify,
    folders_of,
    with_flags,
)
from lorasmith.cli.run_output import preparation_shown, train_and_report
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
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
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    trigger: Annotated[
        str, typer.Option(help="Phrase for the subject or style, put in front of captions that lack it.")
    ] = "",
    resolution: Annotated[
        int | None,
        typer.Option(help="Pictures are scaled to the area of a square of this side, in pixels. Default: the model's."),
    ] = None,
    output: RunOutput = None,
    name: Annotated[str | None, typer.Option(help="Name of the LoRA. Default: that of the folder of images.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of held-out images, instead of a share of the training images.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from scratch instead of resuming an interrupted run.")
    ] = False,
    verify: Verify = False,
    device: Device = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Train a LoRA on a folder of images.

    Captions are read from text files of the same name; pictures without one use the trigger. Prints the plan, trains,
    and saves the LoRA with a report in the folder of the run. Ctrl-C stops and saves; the same command resumes.
    """
    from lorasmith.app.folder_run import prepare
    from lorasmith.app.folder_source import FolderSource, absolute

    for file in ("existing_lora", "training_adapter"):
        if settings[file]:
            settings[file] = absolute(settings[file])
    config = TrainConfig(**settings)
    folders = folders_of(base_dir, extra_model_paths)
    if model is None:
        raise OptionError(_which_models(folders))
    source = FolderSource.of(
        folder,
        model,
        name=name,
        trigger=trigger,
        resolution=resolution,
        validation=validation,
        device=device,
        text_encoders=text_encoder or (),
        vae=vae,
    )
    with preparation_shown() as show:
        prepared = prepare(source, config, folders=folders, on_event=show)
    train_and_report(prepared, output=output, fresh=fresh, verify=verify)


def _which_models(folders: Folders) -> str:
    return (
        "--model must be a .safetensors checkpoint, a diffusers folder or a hub id; found here: "
        f"{', '.join(name for kind in ('checkpoints', 'diffusion_models') for name in folders.files(kind))}; "
        "--model lorasmith-tiny is a small model for tests"
    )
