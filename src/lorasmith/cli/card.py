"""`lorasmith card`: a folder to pass a LoRA on with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_note, print_result
from lorasmith.cli.flags import LoraModel
from lorasmith.core.errors import OptionError

if TYPE_CHECKING:
    from lorasmith.runs.model_card import Card

_LONGEST = 300  # characters of a metadata value that are shown


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("card")(card)


def card(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="The folder of a run, or a LoRA of any trainer.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The new folder. Default: card in the run's, and NAME-card beside a file."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Which LoRA of a run. Default: the recommended one, else the last one.")
    ] = None,
    base_model: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Base model on the hub. Default: what run or file say.")
    ] = "",
    trigger: Annotated[str, typer.Option(help="Phrase for the subject. Default: what run or file say.")] = "",
    license: Annotated[
        str, typer.Option(metavar="NAME", help="The hub's name of the licence. Default: that of the base model.")
    ] = "",
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that it drew, with prompt and seed in its file as A1111 writes them. Repeatable."),
    ] = None,
    private_captions: Annotated[
        bool | None,
        typer.Option(
            "--private-captions/--public-captions",
            help="Leave folders, captions, prompts and unknown entries out of the file's metadata, or upload them "
            "without a question.",
        ),
    ] = None,
    with_training_pictures: Annotated[
        bool, typer.Option("--with-training-pictures", help="Include small versions of the training pictures.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the folder to this repository, owner/name; private unless --public."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub, let everybody see it.")] = False,
    model: LoraModel = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier card at --output.")] = False,
) -> None:
    """Write a folder to share a LoRA, as the Hugging Face hub expects it.

    It has README.md with base model, trigger, licence, pictures with prompts and seeds, how it was trained and how it
    is used; the LoRA in a layout that diffusers loads; and files for model browsers. Nothing of the training pictures
    is in it, and what the LoRA's metadata tells of folders and captions is listed.
    """
    from lorasmith.runs.model_card import write_card

    if public and push_to_hub is None:
        raise OptionError("--public has no effect without --push-to-hub; leave it out, or name a repository")
    repository = ""
    if push_to_hub is not None:
        from lorasmith.runs.hub_upload import named_repository

        repository = named_repository(push_to_hub)
    with console.status("Writing the card"):
        done = write_card(
            source,
            output,
            repository=repository,
            step=step,
            base_model=base_model,
            trigger=trigger,
            licence=license,
            model=model,
            pictures=picture or (),
            private_captions=bool(private_captions),
            with_training_pictures=with_training_pictures,
            overwrite=overwrite,
        )
    if push_to_hub is None:
        print_result(lambda: done, lambda: _print_card(done))
        return
    _print_card(done)
    if done.told and private_captions is None:
        _ask(done)
    from lorasmith.runs.hub_upload import upload_card

    with console.status(f"Uploading to {repository}"):
        uploaded = upload_card(done.folder, repository, public=public)

    def show() -> None:
        echo(f"{'Only you see it' if uploaded.is_private else 'Everybody sees it'}, at {uploaded.address}")

    print_result(lambda: {**vars(done), "uploaded": uploaded}, show)


def _ask(done: Card) -> None:
    """Raise OptionError unless who runs the command agrees to what the metadata tells."""
    if sys.stdin.isatty() and console.draws:
        if typer.confirm("Upload this as well?"):
            return
        raise OptionError("nothing was uploaded; --private-captions --overwrite leaves these entries out")
    raise OptionError(
        f"the LoRA's metadata tells of folders, captions or prompts ({', '.join(done.told)}); add --private-captions "
        "--overwrite to leave this out, or --public-captions --overwrite to upload it"
    )


def _print_card(done: Card) -> None:
    for note in (*done.notes, *done.missing):
        print_note(note)
    if done.told:
        print_note("The LoRA's metadata tells of folders, captions or prompts; --private-captions leaves this out:")
        for key, value in done.told.items():
            echo(f"  {key}: {value if len(value) <= _LONGEST else f'{value[:_LONGEST]} …'}")
    echo(done.folder)
