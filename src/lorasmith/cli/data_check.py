"""`lorasmith data check`: a folder of images before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from lorasmith.cli.console import echo, print_result, progress_shown
from lorasmith.cli.data_output import print_check, print_mended
from lorasmith.cli.flags import (
    AnyBaseModel,
    BaseDir,
    ExtraModelPaths,
    TextEncoderFiles,
    VaeFile,
    folders_of,
    with_flags,
)
from lorasmith.core.choices import Fix
from lorasmith.core.errors import OptionError
from lorasmith.core.files import check_writable, is_folder
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.training.config import TrainConfig

_DATA = (
    "trigger", "captions", "prefix", "suffix", "recursive", "follow_links", "resolution", "more_resolutions",
    "bucket_step", "bucket_min", "bucket_max", "upscale", "crop", "wildcards", "caption_lines", "masks", "mask_folder",
)  # fmt: skip
_TRAINING = ("batch_size", "grad_accumulation_steps", "validation_share")
"""Settings of images and of training that affect what is checked."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    data, training = options_of(DataConfig), options_of(TrainConfig)
    options = {name: data[name] for name in _DATA} | {name: training[name] for name in _TRAINING}
    app.command("check", help=check.__doc__)(with_flags(check, options))


def check(
    folder: Annotated[Path, typer.Argument(help="Folder of images (png, jpg, ...), with captions in .txt files.")],
    model: AnyBaseModel = None,
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the pictures and what to look at.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW_FOLDER",
            help="Write a mended copy: pictures upright, in 8 bits and no larger than needed; copies and unusable "
            "files set apart.",
        ),
    ] = None,
    fix_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help=f"What --fix mends: {', '.join(get_args(Fix))}. Default: all. What training refuses is set apart in "
            "any case. Repeatable.",
        ),
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Check a folder of images before training, with a remedy for each finding.

    Checks for files that cannot be used, small, blurred, empty and repeated pictures, missing, equal and long captions,
    and tags that all share; counts sizes and steps. With --model the sizes and the tokenizer are the model's. The exit
    status is 1 if there is something to look at.
    """
    from lorasmith.app.data_check import check_folder, plain
    from lorasmith.app.data_check_page import write_data_page
    from lorasmith.data.mended_folder import check_target, write_mended
    from lorasmith.families.locating import ModelFiles

    if fix is not None:
        check_target(fix, folder if is_folder(folder) else folder.parent)
    if report is not None:
        check_writable(report.parent)
    config = DataConfig(**{name: settings[name] for name in _DATA})
    if fix_only and fix is None:
        raise OptionError("--fix-only chooses what --fix mends, but no --fix is given; add --fix NEW_FOLDER")
    only = [one for one in get_args(Fix) if one in (fix_only or get_args(Fix))]
    if unknown := set(fix_only or ()) - {*only}:
        raise OptionError(f"--fix-only must be one of {', '.join(get_args(Fix))}, got {min(unknown)!r}")
    training = TrainConfig(**{name: settings[name] for name in _TRAINING})
    with progress_shown("Checking") as progress:
        checked = check_folder(
            folder,
            config,
            files=None if model is None else ModelFiles(model, tuple(text_encoder or ()), vae),
            folders=folders_of(base_dir, extra_model_paths),
            batch=training.samples_per_step,
            validation_share=training.validation_share,
            progress=progress,
        )
    if report is not None:
        write_data_page(checked, report, config, model=model)
    mended = None
    if fix is not None:
        with progress_shown("Writing") as progress:
            mended = write_mended(checked.preflight, config, fix, only=only, progress=progress)

    def show() -> None:
        print_check(checked)
        if report is not None:
            echo(f"{'Report':<10}{report}")
        if mended is not None:
            print_mended(mended)

    print_result(lambda: plain(checked) | ({} if mended is None else {"mended": mended}), show)
    if checked.preflight.findings:
        raise typer.Exit(1)
