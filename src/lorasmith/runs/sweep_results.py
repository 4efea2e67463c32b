"""Results of a sweep, read from its folder: a ranking, `sweep.json` and `sweep.html`.

Held-out images are chosen by their names and judged with the same noise whatever a run's settings and seed are, so runs
on the same images are compared pair by pair: by their lowest held-out loss. Where images, captions or sizes differ, the
losses are of different things; then runs are ranked by the change against the base model, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import write_atomic
from lorasmith.core.typed_json import Scalar
from lorasmith.report.pictures import PictureTable
from lorasmith.report.run_report import change, number
from lorasmith.report.sweep_page import RankedRun, SweepReport, UnrankedRun, sweep_report
from lorasmith.runs.presets import PRESETS, recipe_names
from lorasmith.runs.run_log import LoggedRun, followed, read_run
from lorasmith.runs.run_page import best_lora_of_run, duration, is_own, lora_of_run, previews_of, without_places
from lorasmith.runs.spec import SETTING_PATHS, SETTINGS, RunSpec
from lorasmith.runs.sweep_file import Sweep
from lorasmith.training.events import Outcome
from lorasmith.training.storage.run_folder import RunFolder

SweepRunState = Literal["complete", "failed", "stopped", "running", "waiting"]

_VERSION = 1
_WITH_PICTURES = 12  # the first runs, to limit the size of the page
_UNCOMPARED = frozenset({"existing_state"})  # which only the record of a longer run has


@dataclass(frozen=True, kw_only=True)
class SweepEntry:
    """One run of a sweep."""

    number: Annotated[int, "in the sweep, from 1"]
    name: Annotated[str, "of its folder in that of the sweep"]
    state: Annotated[
        SweepRunState,
        "complete; failed with an error; stopped or killed on the way; running, in whichever process; or waiting",
    ]
    settings: Annotated[Mapping[str, Scalar], "what the sweep varies"]
    place: Annotated[
        int | None, "in the ranking, from 1; None for runs that are not complete or have no held-out loss"
    ] = None
    loss: Annotated[float | None, "the lowest held-out loss"] = None
    best_step: Annotated[int | None, "its step"] = None
    base_loss: Annotated[float | None, "of the same images without the LoRA; None if it was not measured"] = None
    change: Annotated[float | None, "of the loss relative to that, such as -0.05 for 5 % less"] = None
    steps: Annotated[int, "that were taken"] = 0
    seconds: Annotated[float, "of training"] = 0.0
    lora: Annotated[str | None, "its file of the lowest held-out loss, relative to the folder of the sweep"] = None
    judged_by: Annotated[
        str, "digest of the held-out images as they are judged; losses with the same one can be compared"
    ] = ""
    validations: Annotated[tuple[tuple[int, float], ...], "step and loss of each validation"] = ()
    error: Annotated[str, "of a failed run, in a sentence"] = ""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """The content of `sweep.json`."""

    version: Annotated[int, "of this format, raised when an older reader would misunderstand it"] = _VERSION
    file: Annotated[str, "name of the sweep's file"] = ""
    comparable: Annotated[
        bool, "whether all losses are of the same held-out images; if not, the ranking is by `change`"
    ] = True
    runs: Annotated[tuple[SweepEntry, ...], "the best first, then those that are not ranked"] = field(default=())


def result_of(sweep: Sweep, name: str, output: Path, failure: str | None) -> SweepEntry:
    """The result of one run so far, without its place; `failure` is that of `sweep_run.failures_in`."""
    number = list(sweep.runs).index(name) + 1
    waiting = SweepEntry(number=number, name=name, state="waiting", settings=dict(sweep.varied[name]))
    return result_in(output / name, waiting, sweep.runs[name], failure)


def result_in(folder: Path, entry: SweepEntry, spec: RunSpec, failure: str | None) -> SweepEntry:
    """An entry with the result of the run in a folder."""
    failed = replace(entry, state="failed", error=failure) if failure else None
    try:
        with followed(folder) as run:
            return _result(run, entry, spec, failure)
    except OptionError:  # there is no run
        return failed or entry
    except TrainingError as error:
        return failed or replace(entry, state="failed", error=str(error))


def _result(run: LoggedRun, entry: SweepEntry, spec: RunSpec, failure: str | None) -> SweepEntry:
    failed = replace(entry, state="failed", error=failure) if failure else None
    outcome = run.view.outcome
    if outcome is not None and outcome.is_final:
        if _is_of(spec, run):
            return _measured(replace(entry, state="complete"), run)
        return failed or entry  # its error says what differs
    if RunFolder(run.folder).is_training:
        return _measured(replace(entry, state="running"), run)
    if failure is None and outcome is Outcome.FAILED:  # else it was interrupted at once, and its end says so
        name = run.folder.name
        failed = replace(entry, state="failed", error=f"the run failed; logs/{name}.txt and {name}/report.html say why")
    return _measured(failed or replace(entry, state="stopped"), run)


def sweep_record(file: str, entries: Iterable[SweepEntry]) -> SweepRecord:
    """The results of all runs, ranked."""
    entries = list(entries)
    ranked = [entry for entry in entries if entry.state == "complete" and entry.loss is not None]
    comparable = len({entry.judged_by for entry in ranked}) <= 1

    def key(entry: SweepEntry) -> tuple[float, int]:
        value = entry.loss if comparable else entry.change
        return (math.inf if value is None else value), entry.number

    placed = [replace(entry, place=place) for place, entry in enumerate(sorted(ranked, key=key), start=1)]
    others = [entry for entry in entries if entry not in ranked]
    return SweepRecord(file=file, comparable=comparable, runs=(*placed, *others))


def write_results(record: SweepRecord, output: Path) -> Path:
    """Write `sweep.json` and `sweep.html` into the folder of a sweep; returns the page. Raises OutputError."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(output / "sweep.json", f"{text}\n")
    page = output / "sweep.html"
    write_atomic(page, sweep_report(_report(record, output)))
    return page


def _is_of(planned: RunSpec, run: LoggedRun) -> bool:
    """Whether a complete run has the settings, and names the images and model, that the sweep gives it now."""
    try:
        spec = RunSpec.from_record(run.record.source, run.record.asked).trusted()
        is_chosen = planned.preset in PRESETS and run.record.source.get("preset") == planned.preset
        chosen = recipe_names() - planned.settings.keys() if is_chosen else frozenset[str]()
        return _identity(spec, chosen) == _identity(planned, chosen)
    except (OptionError, ValueError):
        return False


def _identity(spec: RunSpec, chosen: Set[str]) -> dict[str, Any]:
    """What makes two runs different, but for settings that the recipe has chosen. Of paths the name counts: photos and
    model may have been moved.
    """
    settings = {
        name: value
        for name, value in {**vars(spec.data), **vars(spec.config)}.items()
        if SETTINGS[name].changes_numbers and name not in _UNCOMPARED | chosen
    }
    for name in SETTING_PATHS:
        if isinstance(path := settings.get(name), str | tuple):
            settings[name] = [PurePath(item).name for item in ([path] if isinstance(path, str) else path)]
    images = [replace(source, path=PurePath(source.path).name) for source in spec.sources]
    validation = spec.validation and PurePath(spec.validation).name
    return {"images": images, "validation": validation, "model": PurePath(spec.model).name, **settings}


def _measured(entry: SweepEntry, run: LoggedRun) -> SweepEntry:
    """The entry with the results in the run's folder."""
    view = run.view
    entry = replace(entry, steps=view.step, seconds=view.seconds)
    if (best := view.best) is None:
        return entry
    is_known = 0 < best.base_loss < math.inf
    path = lora_of_run(run.folder, run.record)
    lora = path and (best_lora_of_run(path) or path)
    taken = run.record.fingerprint
    return replace(
        entry,
        loss=best.loss,
        best_step=best.step,
        base_loss=best.base_loss if is_known else None,
        change=best.loss / best.base_loss - 1 if is_known else None,
        lora=None if lora is None else f"{entry.name}/{lora.name}",
        judged_by=f"{taken.get('held_out', '')[:16]} × {taken.get('config', {}).get('validation_draws', '')}",
        validations=tuple(
            (validation.step, validation.loss) for validation in view.validations if math.isfinite(validation.loss)
        ),
    )


def _report(record: SweepRecord, output: Path) -> SweepReport:
    ranked = [run for run in record.runs if run.place is not None]
    counts = Counter(run.state for run in record.runs)
    varied = list(dict.fromkeys(name for run in record.runs for name in run.settings))
    pictures = [
        (entry, previews_of(output / entry.name, read_run(output / entry.name).view)[0])
        for entry in ranked[:_WITH_PICTURES]
    ]
    table, sheets = _side_by_side([(entry.name, pictured) for entry, pictured in pictures if pictured is not None])
    return SweepReport(
        title=output.resolve().name,
        summary=f"{record.file} · {', '.join(f'{count:,} {state}' for state, count in counts.items())}",
        verdict=_verdict(ranked),
        comparable=record.comparable,
        varied=varied,
        ranked=[_ranked(entry, varied, output) for entry in ranked],
        unranked=[
            UnrankedRun(run.name, run.state, run.steps, without_places(run.error, (output.resolve(), Path.home())))
            for run in record.runs
            if run.place is None
        ],
        pictures=table,
        sheets=sheets,
    )


def _verdict(ranked: list[SweepEntry]) -> str:
    if not ranked:
        return "No run is complete yet."
    best = ranked[0]
    assert best.loss is not None and best.best_step is not None
    base = math.nan if best.base_loss is None else best.base_loss
    return (
        f"{best.name} is the best of {len(ranked):,}: held-out loss {number(best.loss)} at step {best.best_step:,}, "
        f"{change(best.loss, base)} against the base model."
    )


def _ranked(entry: SweepEntry, varied: list[str], output: Path) -> RankedRun:
    assert entry.loss is not None and entry.best_step is not None
    base = math.nan if entry.base_loss is None else entry.base_loss
    report = output / entry.name / "report.html"
    return RankedRun(
        name=entry.name,
        settings=[entry.settings.get(name) for name in varied],
        loss=entry.loss,
        base_loss=base,
        best_step=entry.best_step,
        time=duration(entry.seconds),
        lora=entry.lora or "",
        link=f"{quote(entry.name)}/report.html" if is_own(report, output) else None,
        validations=entry.validations,
    )


def _side_by_side(tables: list[tuple[str, PictureTable]]) -> tuple[PictureTable | None, list[tuple[str, PictureTable]]]:
    """One table, with the LoRA of each run at its greatest strength, if all have the same prompts."""
    columns = {tuple(table.columns) for _, table in tables}
    if len(columns) != 1 or columns == {()}:
        return None, tables
    base = [row for row in tables[0][1].rows if row[0] == "base model"]
    rows = [(name, table.rows[-1][1]) for name, table in tables]
    about = "Pictures of the base model and of each run, by prompt"
    return PictureTable(columns.pop(), [*base, *rows], about), []
