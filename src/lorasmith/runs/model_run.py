"""A run on a loaded model and encoded samples, shared by the library, the nodes and runs on folders.

`training` does not import sampling or reports; this module passes it functions that draw previews and write the report,
and chooses the folder of the run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, get_type_hints

import torch

from lorasmith.core.errors import OptionError
from lorasmith.core.options import config_from, options_of
from lorasmith.core.placement import chosen_device
from lorasmith.core.printable import printable
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.preview_budget import unasked_program, whole_program
from lorasmith.runs.progress_bars import note, run_shown
from lorasmith.runs.run_page import write_report
from lorasmith.runs.run_previews import run_previews
from lorasmith.runs.sidecars import check_sidecars, write_sidecars
from lorasmith.sampling.previews import Partner, parse_prompts
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, EventHandler, RolledBack, Shrunk, Warned
from lorasmith.training.job import Job, plan_job
from lorasmith.training.joint import EngineMaker, StopOfAll, check_captions, train_jointly
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.records import RECORD
from lorasmith.training.storage.run_folder import numbered_runs, output_folder, unfinished_run
from lorasmith.training.train import RunOptions, run_job
from lorasmith.training.watchers import Draw

P = ParamSpec("P")


def train_job(
    denoiser: Denoiser,
    job: Job,
    data: EncodedDataset,
    options: RunOptions,
    *,
    unasked: str | None = None,
    partner: Partner | None = None,
) -> TrainResult:
    """Train a job, which can be run once, with the previews of its settings and the report in the run's folder.

    `unasked` is the prompt of previews where the settings have None, which then take at most a tenth of the run, or are
    left out. `partner` is that of `Previewer`, for one of two experts. `previews`, `page` and `beside` of `options` are
    replaced. Raises OptionError if previews or sidecars are set without an output folder, or sidecars would replace the
    record.
    """
    config = job.config
    prompts, program = parse_prompts(config.previews), whole_program(config)
    if options.output is None and prompts:
        raise OptionError("previews need a folder of the run, got no output; set output, such as runs/dog")

    if config.sidecars:
        check_sidecars(options.title, has_folder=options.output is not None)
    if options.output is not None and config.previews is None and unasked:
        if (fitting := unasked_program(config, denoiser.base, data.samples)) is not None:
            prompts, program = (unasked,), fitting
        else:
            job = replace(job, notes=(*job.notes, _NO_PREVIEWS))

    def beside(lora: Path) -> None:
        if config.sidecars:
            write_sidecars(lora, denoiser.base.family)

    def previews(folder: Path) -> Draw | None:
        if not prompts:
            return None
        return run_previews(
            denoiser,
            config,
            folder,
            prompts=prompts,
            program=program,
            title=options.title,
            device=job.runtime.device,
            cancelled=options.cancelled,
            on_event=options.on_event,
            partner=partner,
        )

    return run_job(job, data, replace(options, previews=previews, page=write_report, beside=beside))


_NO_PREVIEWS = (
    "No previews are drawn, as two pictures would take more than a tenth of this run; prompts in previews are drawn in "
    "any case."
)


def run_folder(
    runs: Path, title: str, *, fresh: bool = False, numbering: str = "-{:03}"
) -> Callable[[Fingerprint], Path]:
    """A function from a run's fingerprint to its folder: one with it unfinished, unless `fresh`, or a new one."""

    def chosen(fingerprint: Fingerprint) -> Path:
        before = None if fresh else unfinished_run(runs, title, fingerprint)
        return before or new_run_folder(runs, title, numbering=numbering)

    return chosen


def new_run_folder(runs: Path, title: str, *, numbering: str = "-{:03}") -> Path:
    """A new folder, numbered after the highest existing one with that title; runs are never overwritten."""
    last = max((number for number, _ in numbered_runs(runs, title, any_case=True)), default=0)
    return runs / (title + numbering.format(last + 1))


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    """Keyword arguments of `train`: every setting of `TrainConfig`, and these.

    Attributes:
        config: base settings; those passed as keywords override them.
        output: folder of the run, or None to write nothing. If it holds the same run (settings, model, data),
            unfinished, that run is resumed bit-identically; a complete one with fewer steps is moved aside and
            continued from its end. If it holds other files, the run is in a subfolder with its title.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        device: where to train; the first GPU, or the CPU, if None.
        validation: held-out images, instead of a share of the data.
        fresh: move an existing run in `output` aside, and start from scratch.
        progress: show a bar and the run's notes on standard error; False shows nothing.
        on_event: receives all events; without it and without progress, warnings are logged (logger `lorasmith`).
        cancelled: called between steps; True ends the run and saves the result.
    """

    config: TrainConfig | None = None
    output: str | Path | None = None
    title: str = RunOptions.title
    trigger: str | None = None
    device: str | torch.device | None = None
    validation: EncodedDataset | None = None
    fresh: bool = False
    progress: bool = True
    on_event: EventHandler | None = None
    cancelled: Callable[[], bool] | None = None


_SURROUNDINGS = [field.name for field in fields(TrainArguments) if "option" not in field.metadata]
"""Names of the arguments of `train` that are not settings."""


def shown_signature(function: Callable[..., Any], arguments: Any) -> Any:
    """The function with the fields of the dataclass in place of `**arguments` in its signature, non-options first."""
    plain, hints = inspect.signature(function, eval_str=True), get_type_hints(arguments)
    first = [one for one in plain.parameters.values() if one.kind is not one.VAR_KEYWORD]
    others = [one.replace(annotation=hints[one.name]) for one in inspect.signature(arguments).parameters.values()]
    settings = options_of(arguments)
    others.sort(key=lambda one: one.name in settings)
    function.__signature__ = plain.replace(parameters=[*first, *others])  # type: ignore[attr-defined]
    return function


class _Train(Protocol[P]):
    def __call__(
        self, model: Model | Denoiser, data: EncodedDataset, *args: P.args, **arguments: P.kwargs
    ) -> TrainResult: ...


def _with_arguments(arguments: Callable[P, TrainConfig]) -> Callable[[Callable[..., TrainResult]], _Train[P]]:
    """Decorator: a function with `**arguments` gets the signature of their dataclass, for type checkers and `help`."""
    return lambda function: shown_signature(function, arguments)


@_with_arguments(TrainArguments)
def train(model: Model | Denoiser, data: EncodedDataset, **arguments: Any) -> TrainResult:
    """Train a LoRA.

    Args:
        model: the base model, with or without LoRAs applied; it is not modified.
        data: encoded samples.
        **arguments: settings by name (`TrainConfig`), and those of `TrainArguments`: output, title, trigger, device,
            validation, fresh, progress, on_event, cancelled, config.

    Returns:
        The LoRA, the loss of each step, and where the files are if there is an output folder.

    Raises:
        OptionError: a setting is unknown, out of range or does not fit the model, or there is no such device.
        LoraError: an existing LoRA cannot be read or is for another model.
        DataError: the samples do not fit the model.
        OutputError: `output` holds another run, this one complete, or one that another process trains, is a file, or
            cannot be used.
        TrainingError: the loss became non-finite more often than `max_rollbacks`, or memory is too small. If steps were
            taken and there is an output folder, their LoRA is saved and the message names the file.
        KeyboardInterrupt: the run was interrupted. Its LoRA and its state are in the output folder, if there is one,
            and its notes name them; the same call continues it.
    """
    given, denoiser, job = _planned(model, arguments)
    silent = RunOptions.on_event if given.progress else _logged
    with run_shown(given.progress) as show:
        options = _options(given, _to_both(show, given.on_event or silent))
        try:
            return train_job(denoiser, job, data, options)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_place_of(options.output, options.title))
            if given.progress:
                note(f"Interrupted: {'; '.join(interrupt.__notes__)}.")
            raise


def train_together(
    model: Model | Denoiser, data: EncodedDataset, runs: Sequence[Mapping[str, Any]], **arguments: Any
) -> list[TrainResult | Exception]:
    """Train several LoRAs at once over one model, which is held in memory once.

    Each result equals that of `train`, to rounding. Rates, ranks, seeds, algorithms, targets, optimizers, batch sizes,
    steps and data may differ; settings of the model and of memory are shared by all.

    Args:
        model: as for `train`.
        data: encoded samples.
        runs: the arguments of each run as for `train`, such as `{"rank": 8, "output": "runs/8"}`; `data` are samples of
            its own.
        **arguments: shared by all runs. No bars are shown.

    Returns:
        The result of each run, or the error that ended it; other runs continue.

    Raises:
        OptionError: as `train`, or the runs cannot train together.
        KeyboardInterrupt: they were interrupted; those with an output folder have saved.
    """
    stop = StopOfAll(arguments.get("cancelled") or RunOptions.cancelled)
    jobs, works = [], []
    for own in runs:
        asked = {**arguments, "cancelled": stop.is_set, **own}
        samples = asked.pop("data", data)
        given, denoiser, job = _planned(model, asked)
        check_captions(job, samples)
        jobs.append(job)
        works.append(partial(_with_engine, denoiser, job, samples, _options(given, given.on_event or _logged)))
    return train_jointly(jobs, works, each_round=stop.look)


def _with_engine(
    denoiser: Denoiser, job: Job, data: EncodedDataset, options: RunOptions, engine: EngineMaker
) -> TrainResult:
    return train_job(denoiser, job, data, replace(options, engine=engine))


def _planned(model: Model | Denoiser, arguments: Mapping[str, Any]) -> tuple[TrainArguments, Denoiser, Job]:
    """The arguments of `train` that are not settings, the model's handle, and the job of the settings."""
    given = TrainArguments(**{name: value for name, value in arguments.items() if name in _SURROUNDINGS})
    settings = {name: value for name, value in arguments.items() if name not in _SURROUNDINGS}
    config = config_from(TrainConfig, {**(asdict(given.config) if given.config else {}), **settings})
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    return given, denoiser, plan_job(denoiser, config, chosen_device(given.device))


def _options(given: TrainArguments, on_event: EventHandler) -> RunOptions:
    return RunOptions(
        output=None if given.output is None else Path(given.output),
        fresh=given.fresh,
        title=given.title,
        trigger=given.trigger,
        validation=given.validation,
        on_event=on_event,
        cancelled=given.cancelled or RunOptions.cancelled,
    )


def _place_of(output: object, title: str) -> str:
    """Where the files of an interrupted run are, in a clause."""
    if not isinstance(output, Path):
        return "nothing was saved, as the run has no folder; give one as output, such as output='runs/dog'"
    output = output_folder(output, title)
    if not (output / RECORD).is_file():
        return "the run had not begun"
    return f"the run is in {printable(str(output), limit=200)}; the same call continues it"


def _to_both(first: EventHandler, second: EventHandler) -> EventHandler:
    def both(event: Event) -> None:
        first(event)
        second(event)

    return both


def _logged(event: Event) -> None:
    """Log the warnings of a run without a watcher, such as a preview that cannot be drawn."""
    if isinstance(event, RolledBack | Shrunk) or (isinstance(event, Warned) and not event.is_remark):
        logging.getLogger("lorasmith").warning(event.message)
