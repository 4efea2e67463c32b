"""`lorasmith train`: a folder of images in, a LoRA out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, counting, say, stoppable, training_progress
from lorasmith.cli.flags import with_flags
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    from lorasmith.data.folder import FolderScan
    from lorasmith.families.model import Model
    from lorasmith.training.train import Job, TrainResult

__all__ = ["free_folder", "register", "report", "run_training"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=train.__doc__)(
        with_flags(train, options_of(TrainConfig), aliases={"training_dtype": "--dtype"})
    )


def train(
    folder: Annotated[Path, typer.Argument(help="Folder of images (png, jpg, ...), with captions in .txt files.")],
    model: Annotated[
        str | None,
        typer.Option(help="Base model: a .safetensors checkpoint, a diffusers folder, a hub id, or lorasmith-tiny."),
    ] = None,
    trigger: Annotated[
        str, typer.Option(help="Phrase that will call the subject or style; put in front of captions that lack it.")
    ] = "",
    resolution: Annotated[
        int | None,
        typer.Option(help="Side in pixels of the square whose area pictures are scaled to. Left out: the model's own."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a new one under runs/ if left out.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the LoRA; the images' folder's if left out.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: the first GPU, or the CPU.")
    ] = None,
    **settings: Any,
) -> None:
    """Train a LoRA on a folder of images.

    Captions are read from text files of the same name; pictures without one get the trigger. Says what it will do,
    trains, and ends with the LoRA, a loss plot and the folder of the run. Ctrl-C saves what there is.
    """
    from lorasmith.data.folder import scan_folder
    from lorasmith.families.loading import load_model

    config = TrainConfig(**settings)
    if model is None:
        raise OptionError(_which_models())
    scan = scan_folder(folder, trigger=trigger)
    _say_images(folder, scan, trigger)
    with console.status(f"Loading {model}"):
        base = load_model(model)
    title = name or folder.resolve().name
    target = output or free_folder(Path("runs"), title)
    result = run_training(
        scan, base, config, title=title, trigger=trigger, resolution=resolution, output=target, device=device
    )
    report(result)
    lora = f"{result.path}"
    prompt = trigger or next((image.caption for image in scan.images if image.caption), "a picture")
    console.print(
        f'\nSee it at work:\n  lorasmith generate --model {model} --lora "{lora}" --prompt "{prompt}"',
        markup=False,
        soft_wrap=True,
    )


def run_training(
    scan: FolderScan,
    base: Model,
    config: TrainConfig,
    *,
    title: str,
    trigger: str,
    resolution: int | None,
    output: Path,
    device: str | None,
) -> TrainResult:
    """Say what will be done, encode, train with a progress bar."""
    from lorasmith.data.loading import encode_scan
    from lorasmith.training.train import plan_job, run_job

    job = plan_job(base.denoiser, config, device)
    _say_plan(scan, base, job, resolution)
    with counting("Encoding") as progress:
        data = encode_scan(scan, base, resolution=resolution, progress=progress)
    with stoppable() as stop, training_progress(config.steps) as show:
        return run_job(
            job,
            data,
            output=output,
            title=title,
            trigger=trigger or None,
            device=device,
            on_event=show,
            cancelled=stop.is_set,
        )


def report(result: TrainResult) -> None:
    """Where everything is."""
    if result.reason == "cancelled":
        console.print(f"Stopped after {len(result.losses)} steps; the LoRA of those steps is saved.")
    for label, path in {
        "LoRA": result.path,
        "Loss plot": result.folder and result.losses and result.folder / "loss.png",
        "Run folder": result.folder,
    }.items():
        if path:
            console.print(f"{label:<11}", end="")
            say(path)


def free_folder(parent: Path, title: str) -> Path:
    """`parent/title-NNN` with the first free number: runs are never written over."""
    number = 1
    while (parent / f"{title}-{number:03}").exists():
        number += 1
    return parent / f"{title}-{number:03}"


def _say_images(folder: Path, scan: FolderScan, trigger: str) -> None:
    console.print(f"[bold]{len(scan.images)} images[/] in {folder}")
    for path, reason in scan.skipped:
        say(f"  skipped {path.name}: {reason}")
    if scan.missing_captions:
        instead = f"they get the trigger, {trigger!r}" if trigger else "they are trained without a caption"
        console.print(f"  {len(scan.missing_captions)} have no caption; {instead}", soft_wrap=True)
    for note in scan.notes:
        say(f"  {note}")


def _say_plan(scan: FolderScan, base: Model, job: Job, resolution: int | None) -> None:
    config = job.config
    per_epoch = sum(image.repeats for image in scan.images)
    taken = config.steps * config.batch_size * config.grad_accumulation_steps
    batch = f"batch {config.batch_size}"
    if config.grad_accumulation_steps > 1:
        batch += f" × {config.grad_accumulation_steps}"
    repeats = f" ({len(scan.images)} images × repeats)" if per_epoch != len(scan.images) else ""
    side = resolution or base.defaults.resolution
    for label, text in {
        "Model": f"{base.title} ({base.family.title})",
        "Trains": job.summary,
        "Pictures": f"about {side}×{side} pixels, sides that divide by {base.defaults.pixel_multiple}",
        "Steps": f"{config.steps} × {batch} = {taken} samples, {per_epoch} in an epoch{repeats} "
        f"= {taken / per_epoch:.1f} epochs",
        "Learning": f"{config.optimizer}, rate {config.learning_rate:g}, seed {config.seed}, "
        f"{config.training_dtype} products, timesteps {config.timesteps}",
    }.items():
        say(f"{label:<9}{text}")


def _which_models() -> str:
    from lorasmith.core.folders import Folders

    found = Folders.load(Path.cwd()).files("checkpoints")
    return (
        "--model must say what to train on: a .safetensors checkpoint, a diffusers folder or a hub id; here are "
        f"{', '.join(found)}; --model lorasmith-tiny is a small model for trying things out"
    )
