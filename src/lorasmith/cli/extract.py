"""`lorasmith extract`: a LoRA from the difference of two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import console, echo, print_result, progress_shown

if TYPE_CHECKING:
    from lorasmith.toolbox.extract import ExtractReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("extract")(extract)


def extract(
    base: Annotated[str, typer.Option(help="The original model: a file or diffusers folder.")],
    tuned: Annotated[str, typer.Option(help="The trained model, of the same family.")],
    rank: Annotated[int, typer.Option(help="Rank at most.")] = 32,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each layer's squared singular values to keep, such as 0.95."),
    ] = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="Include differences of norms and biases; few programs use them.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The new file. Default: the tuned model's name with the rank, in this folder."),
    ] = None,
    layout: Annotated[str, typer.Option(help="Layout of the file: portable, kohya, comfy or diffusers.")] = "portable",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Number format of the file: fp32, bf16 or fp16.")] = "fp16",
    device: Annotated[str, typer.Option(help="Where to compute, such as cuda or cpu.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --output.")] = False,
) -> None:
    """Extract the LoRA of a given rank that best approximates the difference of two models.

    Linear layers and convolutions of the denoiser and the text encoders are compared, one at a time.
    """
    from lorasmith.core.placement import dtype_from_name
    from lorasmith.toolbox.extract import extract as run
    from lorasmith.toolbox.model_files import open_model

    number_format = dtype_from_name(dtype)
    with console.status("Reading the models"):
        models = open_model(base), open_model(tuned)
    target = output or Path(f"{models[1].path.stem}-rank{rank}.safetensors")
    with progress_shown("Extracting") as progress:
        report = run(
            *models,
            target,
            rank=rank,
            energy=energy,
            differences=differences,
            layout=layout,
            dtype=number_format,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    print_result(lambda: {**vars(report), "captured": report.captured}, lambda: _print(report, differences=differences))


def _print(report: ExtractReport, *, differences: bool) -> None:
    ranks = report.ranks.values()
    spread = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no rank"
    echo(f"{len(ranks)} layers, {spread}; {report.unchanged} layers are the same in both")
    echo(f"The LoRA has {report.captured:.2%} of the squared difference between the models")
    if report.left_out:
        why = "cannot be part of a LoRA" if differences else "are left out; --differences includes norms and biases"
        echo(f"{report.left_out} other parameters differ and {why}")
    echo(report.output)
