"""`lorasmith evaluate`: which LoRA of a run is good, by what each of them draws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.console import console, echo, heading, print_note, print_result, progress_shown, stoppable
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, TextEncoderFiles, VaeFile, folders_of, ranged
from lorasmith.core.options import options_of
from lorasmith.evaluation.evaluation_record import EVALUATION_PAGE, DrawingSettings

_SETTINGS = options_of(DrawingSettings)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    loras: Annotated[
        list[Path], typer.Argument(metavar="RUN|LORA...", help="Folders of runs, and LoRA files of any trainer.")
    ],
    model: Annotated[str, typer.Option(help="Base model, as for train.")],
    trigger: Annotated[
        str | None, typer.Option(help="Phrase for the subject. Default: that of the run, or of the file's metadata.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Pictures of the subject to compare with. Default: those of the run."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to ask for beside the trigger, such as 'on a beach', or a prompt that has it. Repeatable; give "
            "at least two. Default: backgrounds, places, times of day and styles."
        ),
    ] = None,
    class_word: Annotated[
        str | None,
        typer.Option("--class", help="What the subject is, such as dog. Default: the trigger without its first word."),
    ] = None,
    most: Annotated[int, ranged(_SETTINGS["most"])] = DrawingSettings.most,
    seed: Annotated[int, ranged(_SETTINGS["seed"])] = DrawingSettings.seed,
    noises: Annotated[int, ranged(_SETTINGS["noises"])] = DrawingSettings.noises,
    clip: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A CLIP of transformers, such as openai/clip-vit-base-patch32, which recognises what was asked for: "
            "surer than by image features, and styles too.",
        ),
    ] = None,
    steps: Annotated[int | None, ranged(_SETTINGS["steps"])] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. Default: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels. Default: the model's own.")] = None,
    text_encoder: TextEncoderFiles = None,
    vae: VaeFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the result; an earlier evaluation in it is replaced. Default: evaluation in the run's, and "
            "NAME-evaluation for a file."
        ),
    ] = None,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Say which LoRA of a run is good.

    Draws each saved LoRA from the same noise: the trigger alone, the trigger with additions such as "in snow", and
    prompts without it. It measures whether pictures look like the training pictures, and whether the additions are
    followed. It recommends the LoRA in which both are highest, or says why none can be recommended. Writes a page, a
    contact sheet, and evaluation.json.

    Needs the extra likeness: pip install "lorasmith\\[likeness]".
    """
    from dataclasses import asdict

    from lorasmith.evaluation.likeness import check_installed
    from lorasmith.families.locating import ModelFiles
    from lorasmith.families.model_search import load_completed
    from lorasmith.runs.evaluate import check_evaluation_folder, subject_of
    from lorasmith.runs.evaluate import evaluate as evaluated

    check_installed()
    subject = subject_of(loras, trigger=trigger, images=images, most=most)
    folder = output or subject.folder
    check_evaluation_folder(folder)
    with console.status(f"Loading {model}"):
        files = ModelFiles(model, tuple(text_encoder or ()), vae)
        loaded = load_completed(files, folders_of(base_dir, extra_model_paths))
    for note in loaded.notes:
        print_note(note)
    for part in loaded.found:
        echo(part.line)
    drawing = DrawingSettings(
        prompts=tuple(prompt or ()),
        class_word=class_word,
        most=most,
        seed=seed,
        noises=noises,
        steps=steps,
        width=width,
        height=height,
    )
    with stoppable() as stop, progress_shown("Drawing") as progress:
        evaluation = evaluated(
            loaded.model, subject, drawing, folder, clip=clip, progress=progress, cancelled=stop.is_set
        )

    def show() -> None:
        for note in evaluation.notes:
            print_note(note)
        for lora in evaluation.loras:
            echo(lora.line)
        echo(evaluation.sentence)
        heading("Page", folder / EVALUATION_PAGE)

    print_result(lambda: {**asdict(evaluation), "folder": folder}, show)
