"""Output of the commands that train: images and plan, progress from events, and the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lorasmith.cli.console import (
    StopRequest,
    console,
    echo,
    heading,
    print_facts,
    print_findings,
    print_note,
    print_result,
    progress_lines,
    progress_shown,
    result_shown,
    stoppable,
)
from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import Folders
from lorasmith.core.printable import count_text
from lorasmith.report.loss_plot import recent_loss
from lorasmith.report.run_report import Advice
from lorasmith.runs.advice import advice_of
from lorasmith.runs.command_lines import arguments_for, command_line, generate_command, positional, resume_command
from lorasmith.runs.drawing import EXPERTS
from lorasmith.runs.expert_runs import ExpertRuns
from lorasmith.runs.plan import FolderPlan
from lorasmith.runs.recorded_run import rights_needed
from lorasmith.runs.reproduce import Differs
from lorasmith.runs.run import Host
from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_plan import (
    NO_CAPTION,
    OWN_CAPTION,
    ClassImageDrawn,
    EncodersHashed,
    ImageEncoded,
    ImagesChecked,
    ImagesFound,
    ModelLoading,
    RunPlan,
    RunPlanned,
    caption_counts,
)
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView, note_of
from lorasmith.training.config import WHOLE_RANGE, ResolvedConfig
from lorasmith.training.events import CaptionEncoded, Event, EventHandler, Outcome, RunStarted, StepDone, Warned
from lorasmith.training.results import TrainResult
from lorasmith.training.validation import UNJUDGED


class TerminalHost(Host):
    """Prints the events of a run inside `planning` and `training`."""

    def __init__(self, folders: Folders | None = None) -> None:
        self.folders = folders
        self.stop = StopRequest()  # set by Ctrl-C during training
        self._show: EventHandler = super().on_event

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM interrupt at once, as nothing is trained yet; encodings and drawn pictures are kept."""
        with stoppable(at_once=True) as self.stop, _planning_shown() as self._show:
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after its step."""
        with stoppable() as self.stop, training_progress() as self._show:
            yield

    def on_event(self, event: Event) -> None:
        if isinstance(event, Differs):
            follows = "the result would differ" if event.is_decisive else "the last bits may differ"
            with result_shown():
                print_note(f"{event.what}; {follows}.", kind="Differs")
        else:
            self._show(event)

    def cancelled(self) -> bool:
        return self.stop.is_set()


@contextlib.contextmanager
def _planning_shown() -> Iterator[EventHandler]:
    """Inside the context, the yielded handler prints the events of planning a run, with a bar for encoding."""
    with contextlib.ExitStack() as live:
        shown, bar = "", _unshown

        def advance(what: str, done: int, total: int, more: str = "") -> None:
            nonlocal shown, bar
            if what != shown:
                live.close()
                shown, bar = what, live.enter_context(progress_shown(what))
            bar(done, total, more=more)

        def show(event: Event) -> None:
            match event:
                case ImagesFound():
                    _print_images(event)
                case ImagesChecked():
                    live.close()
                    print_findings(
                        [finding for finding in event.check.preflight.findings if finding.kind != "unused files"],
                        most=6,
                    )
                case ModelLoading():
                    live.enter_context(console.status(f"Loading {event.model}"))
                case RunPlanned():
                    live.close()
                    _print_plan(event.plan)
                case ClassImageDrawn():
                    advance("Drawing the class", event.done, event.total)
                case EncodersHashed():
                    advance("Hashing encoders", event.done, event.total)
                case CaptionEncoded():
                    advance("Encoding captions", event.done, event.total)
                case ImageEncoded():
                    more = f", {event.cached:,} from the cache" if event.cached else ""
                    advance("Encoding", event.done, event.total, more=more)
                case Warned():
                    live.close()
                    print_note(event.message)

        yield show


def _unshown(done: int, total: int, more: str = "") -> None:
    """Progress before there is a bar."""


@contextlib.contextmanager
def training_progress() -> Iterator[EventHandler]:
    """Inside the context, the yielded handler shows training events: loss, speed and time left in a bar or lines."""
    lines = progress_lines()
    bar = BarColumn(bar_width=max(6, min(40, console.width - 75)))  # the numbers need the rest of a narrow window
    numbers = TextColumn("{task.fields[line]}", style="dim", markup=False)
    progress = Progress(bar, MofNCompleteColumn(), numbers, console=console, disable=not console.draws)
    task = progress.add_task("", total=None, line="")
    view = RunView()

    def show(event: Event) -> None:
        view.take(event)
        if isinstance(event, RunStarted):
            progress.update(task, total=view.steps)
            progress.start()
            lines.begin(f"Step {view.step:,} of {view.steps:,}")
        elif (note := note_of(event)) is not None:
            if note.is_warning:
                print_note(note.text)
            elif note.kind != "Remark":
                print_note(note.text, kind=note.kind, colour="green")
            progress.update(task, completed=view.step)
        else:
            progress.update(task, completed=view.step, line=view.line)
            if view.activity is not None:
                what, done, total = view.activity
                lines.report(f"{what.capitalize()}: {done:,} of {total:,}")
            elif isinstance(event, StepDone):
                lines.report(f"Step {view.step:,} of {view.steps:,}, {view.line}")

    try:
        yield show
    finally:
        progress.stop()
        lines.close()


def print_trained(planned: FolderPlan, result: TrainResult) -> None:
    """Print the result of a run: where its files are, and how to use the LoRA."""

    def show_result() -> None:
        report_result(result, rights_needed(planned.spec, result.folder))
        if result.path is not None:
            files, prompt, base = planned.spec.files, planned.summary.prompt, planned.denoiser.base
            form = base.control_form
            masked = [image for image in planned.summary.scan.images if image.mask and form.is_fill][:1]
            controls = [image.path for image in masked] or planned.summary.controls
            command = generate_command(
                files.model,
                result.path,
                prompt,
                text_encoders=files.text_encoders,
                vae=files.vae,
                edit=files.edit,
                controls=["start.png"] if form.frames else controls,
                mask=next((image.mask for image in masked), None),
                frames=base.defaults.frames if form.frames else 1,
            )
            echo()
            echo("To use it:")
            echo(f"  {command}")

    print_result(lambda: plain_result(result), show_result)


def train_experts_and_report(spec: RunSpec, host: TerminalHost, *, fresh: bool, verify: bool) -> None:
    """Train both experts of a model, and print where their results are and how to use the LoRAs."""
    experts = ExpertRuns(spec, host)
    results: dict[str, TrainResult | None] = {}
    models: list[object] = []
    for expert in EXPERTS:
        with host.planning():
            planned = replace(experts.plan(expert), fresh=fresh, verify=verify)
        files, prompt, frames = planned.spec.files, planned.summary.prompt, planned.job.model.facts.defaults.frames
        models.append(files.model)
        with host.training():
            results[expert] = result = experts.train(planned)
        del planned  # frees its model
        if result is not None and result.reason is Outcome.CANCELLED:
            break

    def show_results() -> None:
        for expert, result in results.items():
            if result is not None:
                echo()
                heading(expert)
                report_result(result, resumable=False)
        loras = [experts.lora(expert) for expert in EXPERTS]
        if host.stop.is_set():
            echo("The same command trains the rest.")
        elif all(loras):
            echo()
            echo("To use them:")
            parts = {"text_encoder": files.text_encoders} | ({"vae": files.vae} if files.vae else {})
            both = {"low_noise_model": models[1], **parts, "lora": loras[0], "low_noise_lora": loras[1]}
            both |= {"frames": frames, "prompt": prompt}
            echo(f"  {command_line(['lorasmith', 'generate', '--model', models[0], *arguments_for(both)])}")

    print_result(lambda: {expert: result and plain_result(result) for expert, result in results.items()}, show_results)
    host.stop.exit_if_set()


_TITLES = {
    "strengths": "Strengths", "steps": "Steps", "lora": "LoRA", "best_lora": "Best LoRA", "loss_plot": "Loss plot",
    "report": "Report",
}  # fmt: skip
"""Files of a run as `plain_result` and `report_result` name them."""


def plain_result(result: TrainResult) -> dict[str, Any]:
    """How a run ended, and its files, as JSON values."""
    recent = recent_loss(result.losses)
    return {
        "run": result.folder,
        "reason": result.reason,
        "steps": result.steps,
        "verdict": result.verdict,
        "advice": asdict(_learnt(result)[1]),
        "loss": {"mean": recent.mean, "of": recent.label},
        "losses": result.losses,
        "validations": [{"step": step, "loss": loss} for step, loss in result.validations],
        "base_loss": result.base_loss,
        "files": _files(result),
    }


def _learnt(result: TrainResult) -> tuple[str, Advice]:
    """The verdict, of the training loss where nothing is held out, and the advice on single images.

    Without advice for a run whose folder has gone.
    """
    try:
        run = None if result.folder is None else read_run(result.folder)
    except LorasmithError:
        run = None
    if run is None:
        return result.verdict, Advice()
    trend = run.view.verdict if result.verdict == UNJUDGED else ""
    return trend or result.verdict, advice_of(run)


def _files(result: TrainResult) -> dict[str, Path]:
    """The existing files of a run, by the keys of `_TITLES`."""
    if result.folder is None:
        return {}
    samples = result.folder / "samples"
    places = {
        "strengths": samples / "strengths.png",
        "steps": samples / "steps.png",
        "lora": result.path,
        "best_lora": result.best_path,
        "loss_plot": result.folder / "loss.png",
        "report": result.folder / "report.html",
    }
    return {key: path for key, path in places.items() if path is not None and path.exists()}


def report_result(result: TrainResult, rights: Sequence[str] = (), *, resumable: bool = True) -> None:
    """Print how a run ended, its files and, if `resumable`, the command that resumes it, with the flags in `rights`."""
    folder = result.folder
    if folder is None:
        echo("Stopped before the first step; nothing was saved.")
        return
    if result.reason is Outcome.CANCELLED:
        after = f"Stopped after {count_text(len(result.losses), 'step')}; the LoRA of those steps is saved."
        echo(f"{after} To continue:" if resumable else after)
        if resumable:
            echo(f"  {resume_command(folder, rights)}")
    if result.reason is Outcome.STOPPED:
        kept = f"the saved LoRA is that of step {result.best_step}, the best one"
        echo(f"Stopped early at step {len(result.losses)}; {kept}.")
    for key, path in _files(result).items():
        echo(f"{_TITLES[key]:<11}{path}")
    echo(f"{'Run folder':<11}{folder}")
    recent = recent_loss(result.losses)
    if math.isfinite(recent.mean):
        echo(f"{'Loss':<11}{recent.mean:.4g} ({recent.label})")
    verdict, advice = _learnt(result)
    echo(f"{'Verdict':<11}{verdict}")
    if advice.images:
        echo(f"{'Images':<11}{advice.summary}")
    if result.lora.rank_schedule is not None and result.path is not None:
        echo("Only Lorasmith uses fewer ranks of a T-LoRA where there is more noise. For ComfyUI:")
        echo(f"  {command_line(['lorasmith', 'bands', positional(result.path)])}")


def _print_images(images: ImagesFound) -> None:
    scan, trigger = images.scan, images.trigger
    heading(count_text(len(scan.images), "image"), f"in {images.folder}")
    for path, reason in scan.skipped:
        echo(f"  skipped {path.name}: {reason}")
    for instead, count in caption_counts(scan.images, trigger).items():
        if instead not in (OWN_CAPTION, NO_CAPTION):  # the check of the images says what lacks a caption
            echo(f"  {count} {'has' if count == 1 else 'have'} no caption; {instead} is used")
    for note in scan.notes:
        echo(f"  {note}")


def _setting_text(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(str, value))
    return "on" if value is True else str(value)


def _print_plan(plan: RunPlan) -> None:
    config, per_epoch = plan.config, plan.samples_per_epoch
    batch = f"batch {config.batch_size}"
    if config.grad_accumulation_steps > 1:
        batch += f" × {config.grad_accumulation_steps}"
    counted = [f"{count} {what}" for count, what in _counts(plan) if count]
    repeats = f" ({', '.join(counted)})" if len(counted) > 1 or per_epoch != len(plan.scan.images) else ""
    sizes = ", ".join(f"{side}×{side}" for side in plan.resolutions)
    falling = "" if config.schedule == "constant" else f" ({config.schedule}, {_mean_rate(config):.2g} on average)"
    facts = {
        "Model": f"{plan.model} ({plan.family})",
        "Trains": plan.trained,
        "Pictures": f"about {sizes} pixels, sides are multiples of {plan.pixel_multiple}",
        "Data": ", ".join(f"{name} {_setting_text(value)}" for name, value in plan.data.items()),
        "Steps": f"{config.steps} × {batch} = {count_text(plan.samples, 'sample')}, {per_epoch} in an epoch{repeats} "
        f"= {plan.epochs:.1f} epochs",
        "Learning": f"{config.optimizer}, rate {config.learning_rate:g}{falling}, "
        f"seed {config.seed}, {config.training_dtype} products, timesteps {config.timesteps}{_noise_text(config)}",
    }
    print_facts(facts, 9, {"Model": [part.line for part in plan.found]})


def _mean_rate(config: ResolvedConfig) -> float:
    """The learning rate, averaged over the run."""
    return config.learning_rate * math.fsum(map(config.scheduled, range(config.steps))) / config.steps


def _noise_text(config: ResolvedConfig) -> str:
    """The range of noise levels, if it is restricted."""
    low, high = config.noise_range
    return "" if (low, high) == WHOLE_RANGE else f" from {low:g} to {high:g}"


def _counts(plan: RunPlan) -> Iterator[tuple[int, str]]:
    """Counts of what makes the samples of an epoch."""
    own = [image for image in plan.scan.images if not image.is_class]
    yield len(own), "images" + (" × repeats" if any(image.repeats > 1 for image in own) else "")
    yield len(plan.held_out), "held out"
    yield len(plan.scan.images) - len(own), "of the class"
