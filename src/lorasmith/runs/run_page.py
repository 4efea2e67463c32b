"""The report of a run, made from its folder alone."""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.files import Stamp, stamp_of, write_atomic
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text
from lorasmith.data.clips import open_file
from lorasmith.evaluation.evaluation_record import EVALUATION, EVALUATION_PAGE, read_evaluation
from lorasmith.families.locating import BUILT_IN
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import steps_of
from lorasmith.report.contact_sheet import pair_stems
from lorasmith.report.curves import Curves
from lorasmith.report.pictures import PictureTable, thinned
from lorasmith.report.run_report import RunReport, Setting, TrainedImage, ValidationRow, number, run_report
from lorasmith.runs.advice import advice_on, losses_by_image
from lorasmith.runs.command_lines import command_line, generate_command, resume_command
from lorasmith.runs.run_images import images_in, left_out_in, thumbnail_of
from lorasmith.runs.run_log import LoggedRun, read_run
from lorasmith.runs.sidecars import LoraUse, use_of
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView, preview_file
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Outcome, Previewed, RunFinished
from lorasmith.training.storage.records import MOST_EVENTS, RunRecord
from lorasmith.training.storage.run_folder import RunFolder

_ENDS: dict[Outcome | None, tuple[str, str]] = {  # status and its colour
    Outcome.FINISHED: ("Finished", "good"),
    Outcome.STOPPED: ("Stopped early", "good"),
    Outcome.CANCELLED: ("Stopped", "fair"),
    Outcome.FAILED: ("Failed", "bad"),
    None: ("Interrupted", "fair"),
}
_MOST_DRAWN = 10_000  # steps of the plot
_MOST_STEPS, _MOST_PROMPTS = 10, 12  # of pictures on the page, to limit its size


def write_report(folder: Path, end: RunFinished | None = None) -> Path:
    """Write `report.html` into the folder of a run, which may still be running; `end` if that is not logged yet.

    OptionError if there is no run in the folder, TrainingError if its record cannot be read, OutputError on writing.
    """
    target = folder / "report.html"
    run = read_run(folder)
    if end is not None:
        run.log.take(end)
    write_atomic(target, page_of(run))
    return target


def page_of(run: LoggedRun) -> str:
    """The report as HTML, which may be given away: paths are those from the folder that holds the runs."""
    parent = run.folder.resolve().parent
    model = [Path(run.record.model.path).parent] if run.record.model.path else []
    places = (parent.parent if parent.name == "runs" else parent, Path.cwd(), Path.home(), *model)
    report = report_of(run)
    told = {name: without_places(getattr(report, name), places) for name in _WITH_PLACES}
    return run_report(replace(report, **told))


_WITH_PLACES = ("files", "commands", "left_out", "use", "programs", "settings", "data", "environment", "notes")
_PLACE = re.compile(r"(?<![\w.~:/\\-])(?:[A-Za-z]:)?[/\\](?:[^/\\\s'\"<>|,]+[/\\])+")
"""Folders of an absolute path."""


def without_places(value: Any, places: Sequence[Path]) -> Any:
    """Texts, in whatever holds them, without the folders of absolute paths; those in the places keep their rest."""
    if isinstance(value, str):
        for place in places:
            if place.parent != place:
                value = value.replace(f"{place}{os.sep}", "")
        return _PLACE.sub("", value)
    if isinstance(value, Setting):
        return replace(value, value=without_places(value.value, places))
    if isinstance(value, Mapping):
        return {name: without_places(member, places) for name, member in value.items()}
    return (
        type(value)(without_places(member, places) for member in value) if isinstance(value, (list, tuple)) else value
    )


def report_of(run: LoggedRun) -> RunReport:
    """The content of the report."""
    view = run.view
    status, mood = ("Training", "good") if is_training(run) else _ENDS[view.outcome]
    before_after, progress = previews_of(run.folder, view)
    quantiles, images = losses_by_image(run)
    lora = lora_of_run(run.folder, run.record)
    use = None if lora is None else _use(run, lora)
    return RunReport(
        title=run.record.title or run.folder.name,
        status=status,
        mood=mood,
        verdict=_verdict(run),
        summary=_summary(run),
        facts=_facts(run, lora),
        files=_files(run.folder, lora, by_likeness=run.record.config.get("early_stop") == "likeness"),
        commands=_commands(run, lora),
        curves=_curves(view),
        validations=[ValidationRow(v.step, v.loss, v.base_loss, v.low, v.high) for v in view.validations],
        quantiles=quantiles,
        images=images,
        advice=advice_on(run.record, images),
        trained_on=_trained_on(run),
        left_out=[(skipped.name, skipped.reason) for skipped in left_out_in(run.record.data)],
        use={} if use is None else use.facts,
        programs={} if use is None else use.programs,
        evaluation=_evaluation(run.folder),
        before_after=before_after,
        progress=progress,
        settings=_settings(run.record.config),
        data=_data(run.record),
        captions=[(sample.name, sample.caption or "") for sample in run.record.samples],
        environment=_environment(run.record),
        notes=_notes(run),
    )


def is_training(run: LoggedRun) -> bool:
    """Whether a process trains it now."""
    return run.view.outcome is None and RunFolder(run.folder).is_training


def _evaluation(folder: Path) -> tuple[str, str] | None:
    """The recommendation in the folder of a run, and the address of its page from there."""
    evaluation = read_evaluation(folder / EVALUATION)
    return None if evaluation is None else (evaluation.sentence, f"{EVALUATION}/{EVALUATION_PAGE}")


def _verdict(run: LoggedRun) -> str:
    """The verdict of the view, and why overfitting cannot be judged without a validation."""
    view = run.view
    verdict = view.verdict[:1].upper() + view.verdict[1:]
    if view.validation is not None:
        return verdict
    if not verdict:
        return "No step was completed."
    if run.record.data.get("held_out"):
        return f"{verdict}; the held-out images were not evaluated yet, so it is too early to judge overfitting."
    return f"{verdict}; no images were held out, so overfitting cannot be judged."


def _summary(run: LoggedRun) -> str:
    view = run.view
    record = run.record
    parts = [f"{record.config.get('algorithm', 'LoRA')} on {record.model.name or 'a model'}"]
    if starts := run.log.starts:
        parts.append(time.strftime("%d %B %Y, %H:%M", time.localtime(starts[0].at)).lstrip("0"))
        parts.append(f"{starts[-1].device}, {starts[-1].dtype}")
        if len(starts) > 1:
            parts.append(f"started {len(starts)} times")
    if view.outcome is None:
        step = f"step {view.step}"
        parts.append(f"at {step}" if is_training(run) else f"killed after {step}, or still running")
    return " · ".join(parts)


def _facts(run: LoggedRun, lora: Path | None) -> dict[str, str]:
    view = run.view
    planned = run.record.config.get("steps")
    facts = {"steps": f"{view.step:,} of {planned:,}" if isinstance(planned, int) else f"{view.step:,}"}
    if before := run.record.steps_before:
        facts["steps before, of the LoRA continued"] = str(before)
    facts["training time"] = duration(view.seconds)
    facts["training images"] = f"{_distinct(run.record):,}"
    facts |= {metric.label: metric.text for metric in view.metrics}
    if (best := view.best) is not None:
        facts[f"best held-out loss, at step {best.step:,}"] = number(best.loss)
        facts["that of the base model"] = number(best.base_loss)
    if starts := run.log.starts:
        facts["trained numbers"] = f"{starts[0].parameters:,}"
        facts["layers"] = f"{starts[0].adapters:,}"
    if lora is not None:
        facts["LoRA file"] = _size(lora.stat().st_size)
    return facts


def lora_of_run(folder: Path, record: RunRecord) -> Path | None:
    """The LoRA in the folder of a run; None if none was saved."""
    path = folder / f"{record.title}.safetensors"
    return path if is_own(path, folder) else None


def loras_of_run(folder: Path, title: str) -> list[tuple[Path, int]]:
    """All LoRAs that a run has saved, those of steps and the best included, with their steps, in this order."""
    own = re.compile(rf"{re.escape(title)}(-best|-step\d+)?")
    paths = [path for path in folder.glob("*.safetensors") if own.fullmatch(path.stem) and is_own(path, folder)]
    found = [(path, step) for path in paths if (step := _steps(str(path), stamp_of(path))) is not None]
    return sorted(found, key=lambda lora: (lora[1], lora[0].name))


@functools.lru_cache(maxsize=5000)
def _steps(path: str, stamp: Stamp) -> int | None:
    """Steps of a LoRA; None if it cannot be read."""
    try:
        return steps_of(check_safetensors(Path(path)).metadata, Path(path).name)
    except LorasmithError:
        return None


def best_lora_of_run(lora: Path) -> Path | None:
    """The best LoRA, by held-out loss or likeness, beside that of the last step; None if it was not saved apart."""
    best = lora.with_stem(f"{lora.stem}-best")
    return best if best.is_file() else None


def _files(folder: Path, lora: Path | None, *, by_likeness: bool) -> dict[str, str]:
    files = {"LoRA": "none was saved" if lora is None else _described(lora)}
    if lora is not None and (best := best_lora_of_run(lora)) is not None:
        files[f"Best {'by likeness' if by_likeness else 'on held-out images'}"] = _described(best)
    return {**files, "Folder of the run": str(folder.resolve())}


def _use(run: LoggedRun, lora: Path) -> LoraUse:
    record = run.record
    model = record.model
    trigger = record.source.get("trigger")
    trigger = trigger if isinstance(trigger, str) else ""
    return use_of(
        lora.resolve(),
        trigger=trigger,
        prompt=trigger or next((sample.caption for sample in record.samples if sample.caption), "a picture"),
        model=model.name if model.name == BUILT_IN else model.path or model.name,
        model_title=model.name or "that of the run",
        family=model.family,
        pipeline=model.pipeline,
        controls=0
        if record.consequences.are_pairs
        else max((image.controls for image in images_in(record.data)), default=0),
    )


def _trained_on(run: LoggedRun) -> list[TrainedImage]:
    shown = []
    for index, image in enumerate(images_in(run.record.data)):
        small = thumbnail_of(run.folder, index)
        marks = [] if image.use == "trained" else [image.use]
        marks += [f"{image.repeats:,} times in an epoch"] if image.repeats > 1 else []
        shown.append(
            TrainedImage(image.name, image.caption, tuple(marks), small if is_own(small, run.folder) else None)
        )
    return shown


def _described(lora: Path) -> str:
    try:
        steps = f", {count_text(steps_of(check_safetensors(lora).metadata, lora.name), 'step')}"
    except LorasmithError:  # not readable; `lorasmith check` explains why
        steps = ""
    return f"{lora.resolve()} ({_size(lora.stat().st_size)}{steps})"


def _commands(run: LoggedRun, lora: Path | None) -> dict[str, str]:
    """Commands to copy, made from the record's settings; no text of the record is copied as a command."""
    view = run.view
    record, folder = run.record, run.folder.resolve()
    try:
        spec = RunSpec.from_record(record.source, record.asked).trusted()
        repeat = spec.command()
    except (OptionError, ValueError):  # a workflow or script, or an optimizer whose import has to be typed
        spec, repeat = None, None
    model = record.model
    base = model.name if model.name == BUILT_IN else model.path or model.name
    caption = next((sample.caption for sample in record.samples if sample.caption), "a picture")
    commands = {}
    if lora is not None:
        commands["Draw a picture with it"] = generate_command(
            base,
            lora.resolve(),
            (spec.data.trigger if spec else "") or caption,
            text_encoders=spec.text_encoders if spec else (),
            vae=spec.vae if spec else None,
            edit=spec.edit if spec else None,
            controls=_drawn_from(folder, spec),
            mask=samples / "mask-1.png" if "mask" in pair_stems(samples := folder / "samples") else None,
            frames=_frames_drawn(folder),
        )
    if view.outcome is None or not view.outcome.is_final:
        commands["Resume the run"] = resume_command(folder)
    if repeat is not None:
        commands["Repeat the run"] = command_line(repeat)
    commands["Update this report"] = command_line(["lorasmith", "report", folder])
    return commands


def _drawn_from(folder: Path, spec: RunSpec | None) -> list[Path]:
    """The controls of the first preview; a name to replace where a run on controls has no previews."""
    samples = folder / "samples"
    found = [samples / f"{stem}-1.png" for stem in pair_stems(samples) if stem.startswith("control")]
    return found or ([Path("photo.png")] if spec is not None and spec.data.control else [])


def _frames_drawn(folder: Path) -> int:
    """Frames of the clip whose first frame the first preview was drawn from; 1 without such."""
    target = folder / "samples" / "target-1.webp"
    return open_file(target, clips=True).frames if is_own(target, folder) and target.is_file() else 1


def _curves(view: RunView) -> Curves:
    last = view.points[-1].step if view.points else 0
    every = max(1, -(-last // _MOST_DRAWN))
    losses, rates = [math.nan] * (last // every), [math.nan] * (last // every)
    for point in view.points:
        if point.step % every == 0:
            losses[point.step // every - 1], rates[point.step // every - 1] = point.loss, point.rate
    return Curves(
        losses=losses,
        rates=rates,
        validations=[(validation.step, validation.loss) for validation in view.validations],
        base_loss=None if view.validation is None else view.validation.base_loss,
        faults=view.faults,
        likenesses=[(likeness.step, likeness.likeness, likeness.adherence) for likeness in view.likenesses],
        own_likeness=None if view.likeness is None else view.likeness.own,
        every=every,
    )


def previews_of(folder: Path, view: RunView) -> tuple[PictureTable | None, PictureTable | None]:
    """Base model and finished LoRA, and the same pictures over the steps."""
    prompts = max((event.prompts for event in view.previews.values()), key=len, default=())[:_MOST_PROMPTS]

    def row(event: Previewed) -> list[Path | None]:
        found = [folder / preview_file(path) for path in event.paths[: len(prompts)]]
        return [path if is_own(path, folder) else None for path in found] + [None] * (len(prompts) - len(found))

    rows = {key: row(event) for key, event in sorted(view.previews.items())}
    rows = {key: paths for key, paths in rows.items() if any(paths)}
    if not rows:
        return _sheet(folder, "strengths.png"), _sheet(folder, "steps.png")
    stems = pair_stems(folder / "samples")
    pairs = [(stem.replace("-", " "), _pair(folder, stem, len(prompts))) for stem in stems]
    base = [("base model", paths) for (_, strength), paths in rows.items() if strength == 0][-1:]
    adapted = [(step, strength, paths) for (step, strength), paths in rows.items() if strength != 0]
    last = max((step for step, _, _ in adapted), default=0)
    final = [(strength, f"LoRA at {strength:g}", paths) for step, strength, paths in adapted if step == last]
    final += [(0.0, label, paths) for label, paths in base]
    counts = Counter(strength for _, strength, _ in adapted)
    usual = max(counts, key=lambda count: (counts[count], count == 1), default=1.0)
    over_time = [(f"step {step:,}", paths) for step, strength, paths in adapted if strength == usual]
    by_strength = [(label, paths) for _, label, paths in sorted(final, key=lambda row: row[0])]
    before_after = PictureTable(prompts, pairs + by_strength, "Pictures of the base model and with the LoRA, by prompt")
    if len(over_time) < 2:
        return before_after, None  # the second table would have the same pictures
    about = f"Pictures by step and prompt, with the LoRA at {usual:g}"
    return before_after, PictureTable(prompts, pairs + base + thinned(over_time, _MOST_STEPS), about)


def _pair(folder: Path, stem: str, count: int) -> list[Path | None]:
    stems = [folder / "samples" / f"{stem}-{number}" for number in range(1, count + 1)]
    paths = [stem.with_suffix(".webp" if stem.with_suffix(".webp").is_file() else ".png") for stem in stems]
    return [path if is_own(path, folder) else None for path in paths]


def is_own(path: Path, folder: Path) -> bool:
    """Whether the file is in the folder of a run itself, not where a link in it leads."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _sheet(folder: Path, name: str) -> PictureTable | None:
    path = folder / "samples" / name
    return (
        PictureTable((), [("", (path,))], "Contact sheet with its labels in the picture")
        if is_own(path, folder)
        else None
    )


def _settings(config: Mapping[str, Any]) -> list[Setting]:
    options = options_of(TrainConfig)
    return [
        Setting(name, value, options[name].default, options[name].help, options[name].group) if name in options
        else Setting(name, value)
        for name, value in config.items()
    ]  # fmt: skip


def _data(record: RunRecord) -> dict[str, str]:
    samples = record.samples
    sizes = Counter("×".join(map(str, reversed(sample.latents[-2:]))) for sample in samples if sample.latents)
    images, with_text = _distinct(record), len({sample.name for sample in samples if sample.caption})
    repeated = f" ({len(samples):,} samples in an epoch)" if images != len(samples) else ""
    counted = "" if "captions_used" in record.data else f", of which {with_text:,} have a text"
    described = {
        "Training images": f"{images:,}{repeated}{counted}",
        "Latents": ", ".join(f"{shape} × {count:,}" for shape, count in sizes.most_common()),
    }
    others = {name: value for name, value in record.data.items() if name not in ("images", "left_out")}
    described |= {name.replace("_", " ").capitalize(): text for name, text in _flat(others).items()}
    return {name: text for name, text in described.items() if text}


def _distinct(record: RunRecord) -> int:
    return len({sample.name for sample in record.samples})


def _environment(record: RunRecord) -> dict[str, str]:
    model = {f"base model {name}": text for name, text in _flat(asdict(record.model)).items()}
    return {name.replace("_", " "): text for name, text in {**model, **_flat(record.environment)}.items() if text}


def _notes(run: LoggedRun) -> list[tuple[str, str, int | None]]:
    view = run.view
    notes = [(note.kind, note.text, note.step) for note in view.notes]
    if run.log.is_cut:
        notes.append(
            ("Note", f"events.jsonl has more than {MOST_EVENTS:,} events, of which the rest is left out.", None)
        )
    if run.log.unreadable:
        left = "is" if run.log.unreadable == 1 else "are"
        lines = count_text(run.log.unreadable, "line")
        notes.append(("Note", f"{lines} of events.jsonl could not be read and {left} left out.", None))
    return notes


def duration(seconds: float) -> str:
    """`42 s`, `12 min` or `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(num_bytes: int) -> str:
    """`12 kB`, `1.3 MB` or `2.1 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested names joined by blanks, list items by commas; None is skipped."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            flat[f"{prefix}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            flat[f"{prefix}{name}"] = str(value)
    return flat
