"""What the commands that train print: images and plan, progress from events, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorasmith.app.command_lines import generate_command, resume_command
from lorasmith.app.run_plan import ImageEncoded, ImagesFound, ModelLoading, RunPlan, RunPlanned
from lorasmith.cli.console import console, counting, remark, say, stoppable
from lorasmith.training.events import (
    Event,
    EventHandler,
    Planned,
    Resumed,
    RolledBack,
    RunStarted,
    Shrunk,
    StepDone,
    Validated,
    Warned,
)
from lorasmith.training.outcome import Outcome

if TYPE_CHECKING:
    from lorasmith.app.folder_run import PreparedRun
    from lorasmith.training.train import TrainResult

__all__ = ["preparation", "say_result", "train_and_say", "training"]


@contextlib.contextmanager
def preparation() -> Iterator[EventHandler]:
    """Prints the events of a run's preparation, with a line while the model loads and a bar for encoding."""
    with contextlib.ExitStack() as live:
        bar: Callable[..., None] | None = None

        def show(event: Event) -> None:
            nonlocal bar
            match event:
                case ImagesFound():
                    _say_images(event)
                case ModelLoading():
                    live.enter_context(console.status(f"Loading {event.model}"))
                case RunPlanned():
                    live.close()
                    _say_plan(event.plan)
                case ImageEncoded():
                    bar = bar or live.enter_context(counting("Encoding"))
                    bar(event.done, event.total)
                case Warned():
                    live.close()
                    remark(event.message)

        yield show


@contextlib.contextmanager
def training() -> Iterator[tuple[EventHandler, Callable[[], bool]]]:
    """A handler that prints training's events, with a bar from the first step on, and whether Ctrl-C was pressed."""
    with stoppable() as stop, training_progress() as show:
        yield show, stop.is_set


@contextlib.contextmanager
def training_progress() -> Iterator[EventHandler]:
    """A progress bar with loss, speed and time left; the yielded function takes training events, which start it."""
    bar = BarColumn(bar_width=max(6, min(40, console.width - 75)))  # the numbers need the rest of a narrow window
    numbers = TextColumn("[dim]{task.fields[numbers]}")
    columns = (bar, MofNCompleteColumn(), numbers, TimeRemainingColumn(), TextColumn("left"))
    progress = Progress(*columns, console=console)
    task = progress.add_task("", total=None, numbers="")
    smooth = first = 0.0
    taken = 0
    judged = ""

    def show(event: Event) -> None:
        nonlocal smooth, taken, first, judged
        if isinstance(event, RunStarted):
            progress.update(task, total=event.steps)
            progress.start()
        elif isinstance(event, Warned | RolledBack | Shrunk):
            remark(event.message)
        elif isinstance(event, Planned):
            remark(event.message, kind="Memory", colour="green")
        elif isinstance(event, Resumed):
            remark(event.message, kind="Resumed", colour="green")
            progress.update(task, completed=event.step)
        elif isinstance(event, Validated):
            judged = f" · held out {100 * (event.loss / event.base_loss - 1):+.1f} %"
        elif isinstance(event, StepDone):
            taken += 1
            first = first or event.at
            # An average over about twenty steps: single losses mostly tell how noisy their samples were.
            smooth += (event.loss - smooth) / min(taken, 20)
            speed = (taken - 1) / (event.at - first) if event.at > first else 0.0
            text = f"loss {smooth:.4f}{judged}" + (f" · {speed:.2f} steps/s" if speed else "")
            progress.update(task, completed=event.step, numbers=text)

    try:
        yield show
    finally:
        progress.stop()


def train_and_say(prepared: PreparedRun, *, output: Path | None, fresh: bool = False) -> None:
    """Train, say where everything is and how to see it at work."""
    from lorasmith.app.folder_run import train_prepared

    with training() as (show, cancelled):
        result = train_prepared(prepared, output=output, fresh=fresh, on_event=show, cancelled=cancelled)
    say_result(result)
    if result.path is not None:
        say(f"\nSee it at work:\n  {generate_command(prepared.source.model, result.path, prepared.plan.prompt)}")


def say_result(result: TrainResult) -> None:
    """How it ended, and where everything is."""
    folder = result.folder
    if folder is None:
        say("Stopped before the first step: there is nothing to save.")
        return
    if result.reason is Outcome.CANCELLED:
        say(f"Stopped after {len(result.losses)} steps; the LoRA of those steps is saved. To go on with it:")
        say(f"  {resume_command(folder)}")
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


def _say_images(found: ImagesFound) -> None:
    scan, trigger = found.scan, found.trigger
    console.print(f"[bold]{len(scan.images)} images[/] in {found.folder}")
    for path, reason in scan.skipped:
        say(f"  skipped {path.name}: {reason}")
    if scan.missing_captions:
        instead = f"they get the trigger, {trigger!r}" if trigger else "they are trained without a caption"
        console.print(f"  {len(scan.missing_captions)} have no caption; {instead}", soft_wrap=True)
    for note in scan.notes:
        say(f"  {note}")


def _say_plan(plan: RunPlan) -> None:
    config, images, per_epoch = plan.config, len(plan.scan.images), plan.samples_per_epoch
    batch = f"batch {config.batch_size}"
    if config.grad_accumulation_steps > 1:
        batch += f" × {config.grad_accumulation_steps}"
    repeats = f" ({images} images × repeats)" if per_epoch != images else ""
    falling = "" if config.schedule == "constant" else f" ({config.schedule})"
    for label, text in {
        "Model": f"{plan.model} ({plan.family})",
        "Trains": plan.trained,
        "Pictures": f"about {plan.resolution}×{plan.resolution} pixels, sides that divide by {plan.pixel_multiple}",
        "Steps": f"{config.steps} × {batch} = {plan.samples} samples, {per_epoch} in an epoch{repeats} "
        f"= {plan.epochs:.1f} epochs",
        "Learning": f"{config.optimizer}, rate {config.learning_rate:g}{falling}, "
        f"seed {config.seed}, {config.training_dtype} products, timesteps {config.timesteps}",
    }.items():
        say(f"{label:<9}{text}")
