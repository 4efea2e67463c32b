"""`lorasmith data`: a folder of images before training, its captions, and what is kept of both encoded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lorasmith.cli.console import (
    console,
    echo,
    heading,
    print_facts,
    print_findings,
    print_note,
    print_result,
    progress_shown,
    stoppable,
)
from lorasmith.cli.flags import (
    AnyBaseModel,
    BaseDir,
    EditModel,
    ExtraModelPaths,
    FollowLinks,
    HelpGroup,
    TextEncoderFiles,
    VaeFile,
    folders_of,
    with_flags,
    with_readable_help,
)
from lorasmith.core.choices import Fix
from lorasmith.core.errors import CancelledError, DataError, OptionError
from lorasmith.core.files import check_writable, is_folder
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text, memory_text
from lorasmith.data.data_config import DataConfig
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.data.encoding_cache import EncoderSummary
    from lorasmith.data.mended_folder import MendedFolder
    from lorasmith.data.preflight import Preflight
    from lorasmith.runs.captioning import Captioned, ImagesToCaption
    from lorasmith.runs.data_check import DataCheck


def register(app: typer.Typer) -> None:
    """Add the commands, in a group."""
    data = typer.Typer(cls=HelpGroup, help="Images and captions before training: checked, captioned, encoded.")
    data.command("caption")(caption)
    cache = typer.Typer(cls=HelpGroup, help="Encoded images and captions, kept between runs.")
    cache.command("list")(list_cache)
    cache.command("clear")(clear_cache)
    data.add_typer(cache, name="cache")
    images, training = options_of(DataConfig), options_of(TrainConfig)
    options = {name: images[name] for name in _DATA} | {name: training[name] for name in _TRAINING}
    data.command("check", help=check.__doc__)(with_flags(check, options))
    for group in (data, cache):
        with_readable_help(group)
    app.add_typer(data, name="data")


_SHOWN = 20


def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of images.")],
    captioner: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="MODEL",
            help="Captioner: one of the model folders, such as florence-2-base (lorasmith models --get gets it), the "
            "folder or hub id of an image-to-text model of transformers, or NAME:ARGUMENT for one that another package "
            "brings.",
        ),
    ],
    request: Annotated[
        str,
        typer.Option(
            help="What a chat model with vision is asked instead of for a sentence, or the model family that was "
            "trained on captions in JSON, such as ideogram4, for captions of its form."
        ),
    ] = "",
    trigger: Annotated[str, typer.Option(help="Phrase that is put in front of captions that lack it.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that are there.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Include all folders inside.")] = False,
    follow_links: FollowLinks = False,
    device: Annotated[
        str | None, typer.Option(help="Device to run on, such as cuda or cpu. Default: the first GPU, or the CPU.")
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Write a caption in a .txt file beside each image that has none.

    Models are read from this computer, without code of their own. Ctrl-C keeps what is written; the same command
    captions the rest.
    """
    from lorasmith.core.placement import chosen_device
    from lorasmith.data.captioners import caption_request, load_captioner
    from lorasmith.runs.captioner_shelf import named_captioner
    from lorasmith.runs.captioning import caption_images, images_to_caption

    captioner = named_captioner(folders_of(base_dir, extra_model_paths), captioner)
    place = chosen_device(device)
    check_writable(folder)
    images = images_to_caption(folder, overwrite=overwrite, recursive=recursive, follow_links=follow_links)
    _print_left_out(images)
    if not images.images:
        print_result(lambda: _plain_captions(images, None))
        return
    with console.status(f"Loading {captioner}"):
        load = load_captioner(captioner, place, request=caption_request(request))
    with stoppable() as stop:
        with progress_shown("Captioning") as progress:
            done = caption_images(images.images, load, trigger=trigger, progress=progress, cancelled=stop.is_set)
        _print_left(folder, done)
        print_result(
            lambda: _plain_captions(images, done),
            lambda: echo(f"{len(done.written):,} captions are written in {folder}"),
        )


def _plain_captions(images: ImagesToCaption, done: Captioned | None) -> dict[str, Any]:
    return {
        "written": () if done is None else done.written,
        "kept": images.kept,
        "sharing": images.sharing,
        "refused": images.refused,
        "empty": () if done is None else done.empty,
        "failed": () if done is None else done.failed,
    }


def _print_left_out(images: ImagesToCaption) -> None:
    if images.kept:
        echo(f"{len(images.kept):,} images have a caption, which is kept; --overwrite replaces it")
    for image, other in images.sharing[:_SHOWN]:
        print_note(f"{image} has the caption file of {other.name}; rename one of them", kind="skipped")
    for image, reason in images.refused[:_SHOWN]:
        print_note(f"{image} {reason}", kind="skipped")


def _print_left(folder: Path, done: Captioned) -> None:
    for image, reason in done.failed[:_SHOWN]:
        print_note(f"{image} {reason}", kind="skipped")
    for image in done.empty[:_SHOWN]:
        print_note(f"{image}: the captioner says nothing of it", kind="skipped")
    if more := max(0, len(done.failed) - _SHOWN) + max(0, len(done.empty) - _SHOWN):
        print_note(f"and {more:,} more", kind="skipped")
    if done.left:
        raise CancelledError(
            f"{len(done.written):,} captions are written and {done.left:,} images are left; the same command captions "
            "them"
        )
    if not done.written:
        raise DataError(f"no caption was written for the images of {folder}; see the reasons above")


OlderThan = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        metavar="DAYS",
        min=0,
        help="Remove only what was not used for this number of days. Default: everything.",
    ),
]


def list_cache() -> None:
    """List what the cache holds of each text encoder and autoencoder: entries, size and last use.

    The cache is in LORASMITH_CACHE_DIR, or in the system's folder for caches.
    """
    from lorasmith.data.encoding_cache import default_cache

    cache = default_cache()
    summaries = cache.summary()
    size = sum(summary.size_bytes for summary in summaries)

    def show() -> None:
        _print_cache(summaries)
        echo(f"{memory_text(size)} in {cache.folder}")

    print_result(lambda: {"folder": cache.folder, "size_bytes": size, "encoders": summaries}, show)


def clear_cache(older_than: OlderThan = None) -> None:
    """Remove encodings from the cache. Runs encode again what they need; running ones lose nothing."""
    from lorasmith.data.encoding_cache import default_cache

    cache = default_cache()
    cleared = cache.clear(unused_days=older_than or 0.0)
    print_result(
        lambda: {"folder": cache.folder, "files": cleared.files, "size_bytes": cleared.size_bytes},
        lambda: echo(f"Removed {cleared.files:,} files, {memory_text(cleared.size_bytes)}, from {cache.folder}"),
    )


def _print_cache(summaries: list[EncoderSummary]) -> None:
    from rich.table import Table

    if not summaries:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Encoder")
    for title in ("Entries", "Size", "Last use"):
        table.add_column(title, justify="right")
    for summary in summaries:
        name = f"{summary.title or 'unnamed'} ({summary.encoder[:8]})"
        damaged = f" and {summary.unreadable:,} unreadable files" if summary.unreadable else ""
        table.add_row(name, f"{summary.entries:,}{damaged}", memory_text(summary.size_bytes), _ago(summary.last_used))
    console.print(table)


def _ago(when: float) -> str:
    days = max(0.0, time.time() - when) / 86400
    return f"{days:.0f} days ago" if days >= 2 else f"{days * 24:.0f} hours ago"


_DATA = (
    "trigger", "captions", "prefix", "suffix", "recursive", "follow_links", "resolution", "more_resolutions",
    "bucket_step", "bucket_min", "bucket_max", "bucket_tokens", "upscale", "crop", "wildcards", "caption_lines",
    "masks", "mask_folder", "control", "controls",
)  # fmt: skip
_TRAINING = ("batch_size", "grad_accumulation_steps", "validation_share")
"""Settings of images and of training that affect what is checked."""


def check(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of images (png, jpg, ...), with captions in .txt files; or a ZIP file of them, or its URL.",
        ),
    ],
    model: AnyBaseModel = None,
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    edit: EditModel = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the pictures and what to look at.")
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW_FOLDER",
            help="Write a mended copy: pictures upright, in 8 bits and no larger than needed; copies and unusable "
            "files moved to unused/.",
        ),
    ] = None,
    fix_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help=f"What --fix mends: {', '.join(get_args(Fix))}. Default: all. What training refuses is moved to "
            "unused/ in any case. Repeatable.",
        ),
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
    **settings: Any,
) -> None:
    """Check a folder of images before training, with a remedy for each finding.

    Checks for files that cannot be used, small, blurred, empty and repeated pictures, missing, equal and long captions,
    a known trigger, and tags and phrases that all share; counts sizes and steps. With --model the sizes and the
    tokenizer are the model's. The exit status is 1 if there is something to look at.
    """
    from lorasmith.data.mended_folder import check_target, write_mended
    from lorasmith.families.locating import ModelFiles
    from lorasmith.runs.data_check import check_folder, plain, write_data_page

    if fix is not None:
        place = Path(folder)
        check_target(fix, place if is_folder(place) else place.parent)
    if report is not None:
        check_writable(report.parent)
    config = DataConfig(**{name: settings[name] for name in _DATA})
    if fix_only and fix is None:
        raise OptionError("--fix-only chooses what --fix mends, but no --fix is given; add --fix NEW_FOLDER")
    only = [arg for arg in get_args(Fix) if arg in (fix_only or get_args(Fix))]
    if unknown := set(fix_only or ()) - {*only}:
        raise OptionError(f"--fix-only must be one of {', '.join(get_args(Fix))}, got {min(unknown)!r}")
    training = TrainConfig(**{name: settings[name] for name in _TRAINING})
    with progress_shown("Checking") as progress:
        checked = check_folder(
            folder,
            config,
            files=None if model is None else ModelFiles(model, tuple(text_encoder or ()), vae, edit),
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


_SIZES = 6


def print_check(check: DataCheck) -> None:
    """Print a checked folder: images, sizes, steps, and what to look at."""
    from lorasmith.runs.data_check import step_lines

    preflight = check.preflight
    heading(count_text(len(preflight.images), "image"), f"in {preflight.folder}")
    assumed = ", assumed; --model or --resolution decides" if check.is_size_assumed else ""
    sides = " and ".join(f"{side}×{side}" for side in preflight.resolutions)
    lines = {
        "Model": check.model or "",
        "Pictures": f"about {sides} pixels, sides are multiples of {preflight.multiple}{assumed}",
        "Sizes": _sizes(preflight),
        "Captions": _captions(preflight),
        "Controls": f"{preflight.paired:,} of {len(preflight.images):,} have theirs" if preflight.paired else "",
        **step_lines(preflight),
    }
    print_facts(lines, 10)
    for note in preflight.notes:
        print_note(note)
    print_findings(preflight.findings)
    if not preflight.findings:
        echo("Nothing to look at: the images are fit for training.")


def print_mended(mended: MendedFolder) -> None:
    """Print what a mended folder holds, and what was changed."""
    from lorasmith.data.folder_listing import CHANGES

    captions = f"with {count_text(mended.captions, 'caption')} " if mended.captions else ""
    heading(count_text(mended.pictures, "picture"), f"{captions}written to {mended.folder}")
    for change, names in mended.changes.items():
        more = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
        echo(f"  {len(names):,} {change}: {', '.join(names[:8])}{more}")
    if mended.changes:
        echo(f"  {CHANGES} in it says what was done to each file.")


def _sizes(preflight: Preflight) -> str:
    shown = [f"{bucket.width}×{bucket.height} × {bucket.images:,}" for bucket in preflight.buckets[:_SIZES]]
    more = len(preflight.buckets) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more sizes" if more > 0 else "")


def _captions(found: Preflight) -> str:
    lengths = [image.tokens for image in found.images if image.tokens is not None]
    tokens = f", up to {max(lengths):,} tokens" if lengths else ""
    trigger = f", trigger {found.trigger!r}" if found.trigger else ""
    return f"{found.captioned:,} of {len(found.images):,} have their own{trigger}{tokens}"
