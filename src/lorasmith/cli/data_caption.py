"""`lorasmith data caption`: captions for the images of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, echo, print_note, print_result, progress_shown, stoppable
from lorasmith.cli.flags import FollowLinks
from lorasmith.core.errors import CancelledError, DataError
from lorasmith.core.files import check_writable

if TYPE_CHECKING:
    from lorasmith.app.captioning import Captioned, ImagesToCaption

_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("caption")(caption)


def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of images.")],
    captioner: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="MODEL",
            help="Captioner: the folder or hub id of an image-to-text model of transformers, or NAME:ARGUMENT for one "
            "that another package brings.",
        ),
    ],
    trigger: Annotated[str, typer.Option(help="Phrase that is put in front of captions that lack it.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that are there.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Include all folders inside.")] = False,
    follow_links: FollowLinks = False,
    device: Annotated[
        str | None, typer.Option(help="Device to run on, such as cuda or cpu. Default: the first GPU, or the CPU.")
    ] = None,
) -> None:
    """Write a caption in a .txt file beside each image that has none.

    Models are read from this computer, without code of their own. Ctrl-C keeps what is written; the same command
    captions the rest.
    """
    from lorasmith.app.captioning import caption_images, images_to_caption
    from lorasmith.core.placement import chosen_device
    from lorasmith.data.captioners import load_captioner

    place = chosen_device(device)
    check_writable(folder)
    found = images_to_caption(folder, overwrite=overwrite, recursive=recursive, follow_links=follow_links)
    _print_left_out(found)
    if not found.images:
        print_result(lambda: _plain(found, None))
        return
    with console.status(f"Loading {captioner}"):
        load = load_captioner(captioner, place)
    with stoppable() as stop:
        with progress_shown("Captioning") as progress:
            done = caption_images(found.images, load, trigger=trigger, progress=progress, cancelled=stop.is_set)
        _print_left(folder, done)
        print_result(
            lambda: _plain(found, done), lambda: echo(f"{len(done.written):,} captions are written in {folder}")
        )


def _plain(found: ImagesToCaption, done: Captioned | None) -> dict[str, Any]:
    return {
        "written": () if done is None else done.written,
        "kept": found.kept,
        "sharing": found.sharing,
        "refused": found.refused,
        "empty": () if done is None else done.empty,
        "failed": () if done is None else done.failed,
    }


def _print_left_out(found: ImagesToCaption) -> None:
    if found.kept:
        echo(f"{len(found.kept):,} images have a caption, which is kept; --overwrite replaces it")
    for image, other in found.sharing[:_SHOWN]:
        print_note(f"{image} has the caption file of {other.name}; rename one of them", kind="skipped")
    for image, reason in found.refused[:_SHOWN]:
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
