"""`lorasmith train`: a folder of images in, a LoRA out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, counting, say, stoppable, training_progress
from lorasmith.cli.flags import with_flags
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from lorasmith.data.dataset import EncodedDataset
    from lorasmith.data.folder import FolderScan
    from lorasmith.families.model import Model
    from lorasmith.training.train import Job, TrainResult

__all__ = ["Prepared", "finish", "free_folder", "prepare", "register", "report", "run_prepared", "source_of"]


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
    validation: Annotated[
        Path | None, typer.Option(help="Folder of images to judge the LoRA by, instead of a share of the images.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, even if this run was broken off before and could go on.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cuda or cpu. Left out: the first GPU, or the CPU.")
    ] = None,
    **settings: Any,
) -> None:
    """Train a LoRA on a folder of images.

    Captions are read from text files of the same name; pictures without one get the trigger. Says what it will do,
    trains, and ends with the LoRA, a loss plot and the folder of the run. Ctrl-C saves what there is.
    """
    config = TrainConfig(**settings)
    if model is None:
        raise OptionError(_which_models())
    source = source_of(
        folder, model, name=name, trigger=trigger, resolution=resolution, validation=validation, config=config
    )
    finish(prepare(source, config, device), output=output, fresh=fresh)


def source_of(
    folder: Path,
    model: str,
    *,
    name: str | None = None,
    trigger: str = "",
    resolution: int | None = None,
    validation: Path | None = None,
    config: TrainConfig,
) -> dict[str, Any]:
    """What `run.json` keeps of the command, to give it again, and `argv`, for people to do so."""
    own = {"model": model, "name": name, "trigger": trigger, "resolution": resolution, "validation": validation}
    chosen = {option: getattr(config, option) for option in options_of(TrainConfig) if not config.is_default(option)}
    argv = ["lorasmith", "train", str(folder.resolve())]
    for option, value in (own | chosen).items():
        if value:
            argv += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    return {
        "command": "train",
        "argv": argv,
        "folder": str(folder.resolve()),
        "model": model,
        "name": name or folder.resolve().name,
        "trigger": trigger,
        "resolution": resolution,
        "validation": str(validation.resolve()) if validation else None,
    }


@dataclass(frozen=True)
class Prepared:
    """A run that could begin.

    Attributes:
        source: how it was asked for, as `run.json` keeps it.
        scan: the images.
        base: the model.
        job: what is trained.
        data, validation: on what, and judged by what, if not by a share of it.
        device: where.
    """

    source: Mapping[str, Any]
    scan: FolderScan
    base: Model
    job: Job
    data: EncodedDataset
    validation: EncodedDataset | None
    device: torch.device


def prepare(source: Mapping[str, Any], config: TrainConfig, device: str | None) -> Prepared:
    """Load and encode everything that `lorasmith train` needs, and say what will be done."""
    import torch

    from lorasmith.core.placement import best_device
    from lorasmith.data.folder import scan_folder
    from lorasmith.data.loading import encode_scan
    from lorasmith.families.loading import load_model
    from lorasmith.training.job import plan_job

    folder, trigger, resolution = Path(source["folder"]), source["trigger"], source["resolution"]
    scan = scan_folder(folder, trigger=trigger)
    _say_images(folder, scan, trigger)
    judged = None if source["validation"] is None else scan_folder(Path(source["validation"]), trigger=trigger)
    with console.status(f"Loading {source['model']}"):
        base = load_model(source["model"])
    place = torch.device(device) if device else best_device()
    job = plan_job(base.denoiser, config, place)
    _say_plan(scan, base, job, resolution)
    with counting("Encoding") as progress:
        data = encode_scan(scan, base, resolution=resolution, progress=progress)
        held_out = None if judged is None else encode_scan(judged, base, resolution=resolution)
    return Prepared(source, scan, base, job, data, held_out, place)


def run_prepared(prepared: Prepared, *, output: Path | None, fresh: bool) -> TrainResult:
    """Train with a progress bar.

    Args:
        prepared: what.
        output: folder of the run; left out, the folder under runs/ that holds this run, broken off, or a new one.
        fresh: do not go on with a run that was broken off.
    """
    from lorasmith.nodes.previewing import run_previews
    from lorasmith.training.run_folder import unfinished_run
    from lorasmith.training.train import Surroundings, run_job

    job, title = prepared.job, prepared.source["name"]

    def folder_for(fingerprint: Mapping[str, Any]) -> Path:
        runs = Path("runs")
        return (None if fresh else unfinished_run(runs, title, fingerprint)) or free_folder(runs, title)

    with stoppable() as stop, training_progress(job.config.steps) as show:
        around = Surroundings(
            output=output or folder_for,
            fresh=fresh,
            title=title,
            trigger=prepared.source["trigger"] or None,
            device=prepared.device,
            validation=prepared.validation,
            previews=lambda folder: run_previews(
                job.denoiser, job.config, folder, title=title, device=prepared.device, cancelled=stop.is_set
            ),
            source=prepared.source,
            on_event=show,
            cancelled=stop.is_set,
        )
        return run_job(job, prepared.data, around)


def finish(prepared: Prepared, *, output: Path | None, fresh: bool) -> TrainResult:
    """Train, say where everything is and how to see it at work."""
    result = run_prepared(prepared, output=output, fresh=fresh)
    report(result)
    source = prepared.source
    captions = (image.caption for image in prepared.scan.images)
    prompt = source["trigger"] or next(filter(None, captions), "a picture")
    say(f'\nSee it at work:\n  lorasmith generate --model {source["model"]} --lora "{result.path}" --prompt "{prompt}"')
    return result


def report(result: TrainResult) -> None:
    """Where everything is."""
    if result.reason == "cancelled" and result.folder:
        console.print(f"Stopped after {len(result.losses)} steps; the LoRA of those steps is saved. To go on with it:")
        say(f"  lorasmith resume {result.folder}")
    if result.verdict:
        say(f"{'Verdict':<11}{result.verdict}")
    for label, path in {
        "LoRA": result.path,
        "Best LoRA": result.best_path,
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
