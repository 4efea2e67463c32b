"""`lorasmith train`: a folder of images in, a LoRA out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import console, counting, say, stoppable, training_progress
from lorasmith.cli.flags import arguments_for, with_flags
from lorasmith.core.errors import OptionError
from lorasmith.core.options import config_from, options_of
from lorasmith.training.config import TrainConfig
from lorasmith.training.outcome import Outcome

if TYPE_CHECKING:
    import torch

    from lorasmith.data.dataset import EncodedDataset
    from lorasmith.data.folder import FolderScan
    from lorasmith.families.model import Model
    from lorasmith.training.train import Job, TrainResult

__all__ = [
    "Prepared",
    "asked_again",
    "finish",
    "free_folder",
    "prepare",
    "register",
    "report",
    "run_prepared",
    "source_of",
]


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
    trains, and ends with the LoRA, a report and the folder of the run. Ctrl-C saves what there is; the same command
    goes on from there.
    """
    config = TrainConfig(**settings)
    if config.existing_lora is not None:
        config = replace(config, existing_lora=_located(config.existing_lora))
    if model is None:
        raise OptionError(_which_models())
    source = source_of(
        folder,
        model,
        name=name,
        trigger=trigger,
        resolution=resolution,
        validation=validation,
        device=device,
        config=config,
    )
    finish(prepare(source, config), output=output, fresh=fresh)


def source_of(
    folder: Path,
    model: str,
    *,
    name: str | None = None,
    trigger: str = "",
    resolution: int | None = None,
    validation: Path | None = None,
    device: str | None = None,
    config: TrainConfig,
) -> dict[str, Any]:
    """What `run.json` keeps of the command, to give it again from anywhere, and `argv`, for people to do so."""
    own = {
        "model": _located(model),
        "name": name,
        "trigger": trigger,
        "resolution": resolution,
        "validation": validation and str(validation.resolve()),
        "device": device,
    }
    chosen = {option: getattr(config, option) for option in options_of(TrainConfig) if not config.is_default(option)}
    given = {option: value for option, value in own.items() if value} | chosen
    argv = ["lorasmith", "train", str(folder.resolve()), *arguments_for(given)]
    title = name or folder.resolve().name
    return {**own, "command": "train", "argv": argv, "folder": str(folder.resolve()), "name": title}


def asked_again(
    run: Mapping[str, Any], *, model: str | None, data: Path | None, device: str | None
) -> tuple[dict[str, Any], TrainConfig]:
    """How a run was asked for: its source, with what is elsewhere now, and its settings.

    Args:
        run: `run.json`, or what a LoRA says of the run that made it.
        model, data, device: instead of the run's.
    """
    now = {"model": model and _located(model), "folder": data and str(data.resolve()), "device": device}
    source = {**run["source"], **{name: value for name, value in now.items() if value}}
    # `auto` may be another format here, and this is to be the same run.
    return source, config_from(
        TrainConfig, {**run["asked"], "training_dtype": run["fingerprint"]["config"]["training_dtype"]}
    )


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


def prepare(source: Mapping[str, Any], config: TrainConfig) -> Prepared:
    """Load and encode everything that `lorasmith train` needs, and say what will be done."""
    from lorasmith.core.placement import chosen_device
    from lorasmith.data.encoding import encode_scan
    from lorasmith.data.folder import scan_folder
    from lorasmith.families.loading import load_model
    from lorasmith.training.job import plan_job

    folder, trigger, resolution = Path(source["folder"]), source["trigger"], source["resolution"]
    if re.search(r"[/\\]|^\.*$", source["name"]):
        raise OptionError(
            f"name must be that of a file, without folders, got {source['name']!r}; --output is for those"
        )
    place = chosen_device(source.get("device"))
    scan = scan_folder(folder, trigger=trigger)
    _say_images(folder, scan, trigger)
    judged = None if source["validation"] is None else scan_folder(Path(source["validation"]), trigger=trigger)
    with console.status(f"Loading {source['model']}"):
        base = load_model(source["model"])
    job = plan_job(base.denoiser, config, place)
    _say_plan(scan, base, job, resolution)
    with counting("Encoding") as progress:
        data = encode_scan(scan, base, resolution=resolution, device=place, progress=progress)
        held_out = None if judged is None else encode_scan(judged, base, resolution=resolution, device=place)
    return Prepared(source, scan, base, job, data, held_out, place)


def run_prepared(
    prepared: Prepared,
    *,
    output: Path | Callable[[Mapping[str, Any]], Path] | None,
    fresh: bool,
    until: int | None = None,
) -> TrainResult:
    """Train with a progress bar.

    Args:
        prepared: what.
        output: folder of the run, or what chooses it by the run's fingerprint; left out, the folder under runs/ that
            holds this run, broken off, or a new one.
        fresh: do not go on with a run that was broken off.
        until: step behind which it ends; None for the last.
    """
    from lorasmith.app.run_previews import run_previews
    from lorasmith.training.runs.run_folder import unfinished_run
    from lorasmith.training.train import Surroundings, run_job

    job, title = prepared.job, prepared.source["name"]

    def folder_for(fingerprint: Mapping[str, Any]) -> Path:
        runs = Path("runs")
        return (None if fresh else unfinished_run(runs, title, fingerprint)) or free_folder(runs, title)

    with stoppable() as stop, training_progress() as show:
        around = Surroundings(
            output=output or folder_for,
            fresh=fresh,
            title=title,
            trigger=prepared.source["trigger"] or None,
            validation=prepared.validation,
            # They load the LoRA as it is saved, which has what the job's denoiser carries along of a continued one.
            previews=lambda folder: run_previews(
                prepared.base.denoiser, job.config, folder, title=title, device=prepared.device, cancelled=stop.is_set
            ),
            source=prepared.source,
            on_event=show,
            cancelled=stop.is_set,
            until=until,
        )
        return run_job(job, prepared.data, around)


def finish(prepared: Prepared, *, output: Path | None, fresh: bool) -> None:
    """Train, say where everything is and how to see it at work."""
    from lorasmith.training.runs.run_page import command_line

    result = run_prepared(prepared, output=output, fresh=fresh)
    report(result)
    if result.path is not None:
        source = prepared.source
        captions = (image.caption for image in prepared.scan.images)
        prompt = source["trigger"] or next(filter(None, captions), "a picture")
        use = ["lorasmith", "generate", "--model", source["model"], "--lora", result.path, "--prompt", prompt]
        say(f"\nSee it at work:\n  {command_line(use)}")


def report(result: TrainResult) -> None:
    """How it ended, and where everything is."""
    from lorasmith.training.runs.run_page import command_line

    folder = result.folder
    if folder is None:
        say("Stopped before the first step: there is nothing to save.")
        return
    if result.reason is Outcome.CANCELLED:
        say(f"Stopped after {len(result.losses)} steps; the LoRA of those steps is saved. To go on with it:")
        say(f"  {command_line(['lorasmith', 'resume', folder])}")
    if result.reason is Outcome.STOPPED:
        best = min(result.validations, key=lambda one: one[1])[0]
        say(f"Stopped early, at step {len(result.losses)}: the held-out images were best at {best}, which is saved.")
    say(f"{'Verdict':<11}{result.verdict}")
    for label, path in {
        "LoRA": result.path,
        "Best LoRA": result.best_path,
        "Steps": folder / "samples" / "steps.png",
        "Strengths": folder / "samples" / "strengths.png",
        "Loss plot": folder / "loss.png",
        "Report": folder / "report.html",
        "Run folder": folder,
    }.items():
        if path is not None and path.exists():
            say(f"{label:<11}{path}")


def free_folder(parent: Path, title: str) -> Path:
    """`parent/title-NNN` with the first free number: runs are never written over."""
    number = 1
    while (parent / f"{title}-{number:03}").exists():
        number += 1
    return parent / f"{title}-{number:03}"


def _located(path: str) -> str:
    """A path from wherever the command is given again; what is no path, such as a hub id, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


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
        "Learning": f"{config.optimizer}, rate {config.learning_rate:g}{_falling(config.schedule)}, "
        f"seed {config.seed}, {config.training_dtype} products, timesteps {config.timesteps}",
    }.items():
        say(f"{label:<9}{text}")


def _falling(schedule: str | None) -> str:
    return "" if schedule == "constant" else f" ({schedule})"


def _which_models() -> str:
    from lorasmith.core.folders import Folders

    found = Folders.load(Path.cwd()).files("checkpoints")
    return (
        "--model must say what to train on: a .safetensors checkpoint, a diffusers folder or a hub id; here are "
        f"{', '.join(found)}; --model lorasmith-tiny is a small model for trying things out"
    )
