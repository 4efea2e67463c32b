"""A whole run: its folder, resuming, and saving the result however the run ends.

Planning is in `job`, steps in `loop`, callbacks between steps in `watchers`, and results in `results`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.errors import LorasmithError, OptionError, OutputError, TrainingError
from lorasmith.core.placement import dtype_from_name, dtype_name
from lorasmith.core.power_average import LENGTHS
from lorasmith.core.printable import count_text
from lorasmith.core.stores import UnreachableError
from lorasmith.data.dataset import EncodedDataset, Split, split
from lorasmith.data.folder import ImageFile
from lorasmith.families.model import Denoiser
from lorasmith.training.batches import captions_ready
from lorasmith.training.config import DtypeSetting
from lorasmith.training.engine import Engine
from lorasmith.training.events import (
    CaptionEncoded,
    EarlierEvents,
    Event,
    EventHandler,
    Outcome,
    Resumed,
    RunFinished,
    RunStarted,
    Warned,
)
from lorasmith.training.job import TrainJob, engine_of
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.methods.all_methods import other_texts
from lorasmith.training.notes import ReportNote
from lorasmith.training.processor_way import ProcessorWay, on_processor
from lorasmith.training.recovery import RunState
from lorasmith.training.results import BaseHashes, Results, TrainResult
from lorasmith.training.run_requests import DrawRequest, RequestWatch
from lorasmith.training.storage.fingerprint import Fingerprint, differences, environment, fingerprint
from lorasmith.training.storage.records import EVENTS, RunRecord, check_title, read_history, run_record
from lorasmith.training.storage.run_folder import (
    PREVIEW_LORA,
    RunFolder,
    check_room,
    checked_start,
    claimed_run,
    continuing,
    is_same_or_longer,
    new_run_folder,
    numbered_runs,
    output_folder,
    unfinished_run,
)
from lorasmith.training.storage.run_states import SPARE_BYTES, StateSaver, free_bytes, load_state
from lorasmith.training.watchers import (
    AverageWatch,
    Draw,
    EffectWatch,
    LikenessWatch,
    LoraWatch,
    PreviewWatch,
    ValidationWatch,
    preview_steps,
)

_STATE_BYTES = 16
"""Bytes of a run state per trained parameter: fp32 weights, their average, and two moments of the optimizer."""

_PIXEL_BYTES = 2
"""Bytes of a PNG per pixel, about."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run ready to start. Raises OptionError for a title that is not a file name.

    The same run in its folder is resumed; if that is complete with fewer steps, it is moved aside and the run starts
    from its end. A subfolder named `title` is used if the folder has files that are not a run's.
    """

    # from which previews are drawn, without the parts of a continued LoRA; None for a model that cannot be sampled
    denoiser: Denoiser | None = None
    job: TrainJob  # which can be run once
    data: EncodedDataset
    validation: EncodedDataset | None = None  # held-out images, instead of a share of the data
    title: str = "lora"  # name of the LoRA, and of its file
    trigger: str | None = None  # for the metadata
    prompt: str | None = None  # of the previews where the settings have None
    images: Sequence[ImageFile] = ()  # of which the report shows small versions
    # JSON values from which the run can be repeated, such as paths
    source: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # recorded about the images, JSON values by name
    output: Path | None = None  # folder of the run
    claim: RunFolder | None = None  # that folder, if it is claimed already; it is released in the end
    fresh: bool = False  # move an existing run aside instead of resuming it
    verify: bool = False  # compare and record every byte of the base model's files
    until: int | None = None  # step after which the run is cancelled

    def __post_init__(self) -> None:
        check_title(self.title)


class RunHost:
    """What surrounds a run: receives its events, may stop it, chooses its folder, draws previews, writes the report.

    This one ignores events and draws and writes nothing; doors inherit from `runs.run.Host`.
    """

    threads: int | None = None  # of a recorded run that is repeated on the CPU
    runs: Path | None = None  # parent of the folders of runs without an output, which write no files if it is None
    numbering: str = "-{:03}"  # of the names of these folders, behind the title
    mirror: str | None = None  # URL of the copy of the run's folder; one that ends in / gets its name

    def on_event(self, event: Event) -> None:
        """Receive an event."""

    def cancelled(self) -> bool:
        """Whether the run is to end after this step, and to save its result."""
        return False

    def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
        """The folder of the run: an unfinished one with this fingerprint, unless `fresh`, or a new one.

        Called in rank 0, and a second time if another process claims the folder first.
        """
        if plan.output is not None:
            return plan.output
        assert self.runs is not None
        before = None if plan.fresh else unfinished_run(self.runs, plan.title, fingerprint)
        return before or new_run_folder(self.runs, plan.title, numbering=self.numbering)

    def begin(self, plan: Plan, folder: Path) -> Draw | None:
        """Called with the folder before the first step; returns what draws previews."""
        return None

    def draw(self, plan: Plan, folder: Path, request: DrawRequest, lora: Path | None) -> tuple[Sequence[Path], str]:
        """Draw a prompt that was requested while the run trains, without and with the LoRA at `lora`, or the saved one
        that it names; returns the files, and a note. Raises LorasmithError.
        """
        raise OptionError("drawing needs a run that a door of Lorasmith surrounds; draw with its saved LoRA")

    def write_beside(self, plan: Plan, lora: Path) -> None:
        """Write files beside the finished LoRA."""

    def write_report(self, folder: Path, end: RunFinished) -> None:
        """Write the report into the folder."""


def run_bytes(job: TrainJob) -> int:
    """Approximate bytes that a run writes: LoRAs, previews, two run states, and small files."""
    config = job.config
    loras = 1 + (config.steps // config.save_every if config.save_every else 0)
    lora_bytes = job.parameters * dtype_from_name(config.lora_dtype).itemsize
    pictures = len(config.previews.split("|")) * (len(preview_steps(config)) + 2) if config.previews else 0
    picture_bytes = _PIXEL_BYTES * job.model.facts.defaults.resolution**2
    # In more bits than the LoRA's, see `Results.save_averages`.
    loras += config.post_hoc_ema * len(LENGTHS)
    return loras * lora_bytes + 2 * _STATE_BYTES * job.parameters + pictures * picture_bytes + SPARE_BYTES


def run_job(plan: Plan, host: RunHost, engine: Callable[[TrainJob], Engine] = engine_of) -> TrainResult:
    """Train on the device that the job was planned for.

    Raises LorasmithError if the data do not fit or the loss became non-finite. If steps were taken and there is an
    output folder, their LoRA is saved and the message names the file.
    """
    job, data, processes = plan.job, plan.data, plan.job.way.processes
    with contextlib.ExitStack() as stack:
        if plan.claim is None and plan.output is not None:
            claim = RunFolder(output_folder(plan.output, plan.title))
            processes.broadcast_from_rank0(claim.claim)
            plan = replace(plan, claim=claim)
        if plan.claim is not None:
            stack.callback(plan.claim.release)
            if host.mirror and not plan.fresh:
                processes.broadcast_from_rank0(partial(_restore, host, plan.claim))
        job.model.check(data.samples)
        if plan.trigger and not data.trigger:
            data = replace(data, trigger=plan.trigger)
        parts = split(data, share=job.config.validation_share, given=plan.validation)
        job = job.for_samples(parts.training.samples)
        if engine is engine_of:  # runs that share passes share their format and threads
            begun = partial(_begun, plan, host, job, parts)
            job = stack.enter_context(on_processor(job, parts.training.samples, begun=begun, cancelled=host.cancelled))
        record = run_record(job, parts, title=plan.title, source=plan.source, facts=plan.facts, verify=plan.verify)
        _check_together(job, record)
        if unknown := processes.broadcast_from_rank0(lambda: checked_start(record)):
            job = replace(job, notes=(*job.notes, ReportNote(unknown)))
        folder, start = None, None
        if plan.output is not None or host.runs is not None:
            # Only rank 0 uses the folder, and broadcasts how the run starts.
            def begin() -> tuple[RunRecord, RunState | None]:
                nonlocal folder
                folder, found, state = stack.enter_context(_opened(record, plan, host))
                return found, state

            record, start = processes.broadcast_from_rank0(begin)
            job = job.starting_from(record.config["existing_state"])
        return _Run(replace(plan, job=job), parts, host, record, folder).train(engine(job), start)


def _restore(host: RunHost, folder: RunFolder) -> None:
    """Fetch the run from its mirror if that is further; a store that cannot be used ends nothing."""
    assert host.mirror is not None
    from lorasmith.training.storage.run_mirror import mirror_of, restore

    try:
        restore(mirror_of(host.mirror, folder.path), folder, host.on_event)
    except UnreachableError as error:
        host.on_event(Warned(message=f"{error}. The run begins with what is in {folder.path}."))


def _begun(
    plan: Plan, host: RunHost, job: TrainJob, parts: Split, formats: Sequence[DtypeSetting]
) -> ProcessorWay | None:
    """Format and threads of the run that this one repeats or continues, with one of these formats; None if it is new.

    Its threads are torch's on another machine.
    """
    if host.threads is not None:
        return ProcessorWay(formats[0], host.threads)
    where = host.runs if plan.claim is None else plan.claim.path
    if plan.fresh or where is None or not (numbered_runs(where, plan.title) or RunFolder(where).exists):
        return None
    own = fingerprint(job, parts.training, parts.held_out)
    environments = environment(job.way.device, job.config.optimizer, compile=job.config.compile)
    for dtype in formats:
        wanted: Fingerprint = {**own, "config": {**own["config"], "training_dtype": dtype}}
        path = where if plan.claim is not None else unfinished_run(where, plan.title, wanted)
        if path is None or not (folder := RunFolder(path)).exists:
            continue
        with contextlib.suppress(LorasmithError):  # a damaged record is reported when the run begins
            record = folder.record()
            if is_same_or_longer(record.fingerprint, wanted):
                before = record.all_environments[-1]
                is_here = all(before.get(name) == environments[name] for name in ("processor", "cores"))
                threads = before.get("threads") if is_here else None
                return ProcessorWay(dtype, threads if isinstance(threads, int) else torch.get_num_threads())
    return None


@contextlib.contextmanager
def _opened(record: RunRecord, plan: Plan, host: RunHost) -> Iterator[tuple[RunFolder, RunRecord, RunState | None]]:
    """Inside the context, a run has its folder; yields it with the record as it is there, and the state to resume."""
    folder = _claimed(plan, host, record.fingerprint)
    with folder.claimed():
        check_room(folder.path, run_bytes(plan.job))
        if folder.exists and not plan.fresh:
            record = continuing(folder, record, host.on_event)
        with claimed_run(folder, record, fresh=plan.fresh, on_event=host.on_event) as start:
            before = folder.record()
            whole: Fingerprint = {**before.fingerprint, **record.fingerprint}  # digests of whole files are kept
            yield folder, replace(record, environments=before.environments, fingerprint=whole), start


def _claimed(plan: Plan, host: RunHost, fingerprint: Fingerprint) -> RunFolder:
    """The folder of a run, claimed; one that is chosen is chosen again if another run was faster."""
    before = None
    while True:
        named = host.folder(plan, fingerprint)
        path = output_folder(named, plan.title)
        folder = plan.claim if plan.claim is not None and plan.claim.path == path else RunFolder(path)
        try:
            folder.claim()
            break
        except OutputError:
            if path == before:
                raise
            before = path
    if path != named:
        host.on_event(Warned(message=f"{named} has files that are not a run's; the run is in {path}."))
    return folder


def _check_together(job: TrainJob, record: RunRecord) -> None:
    processes, config = job.way.processes, job.config
    records = processes.gathered({"versions": record.environment["versions"], **record.fingerprint})

    def check() -> None:
        per_step, size = config.samples_per_step, processes.size
        if per_step < size:
            raise OptionError(
                f"batch_size × grad_accumulation_steps must be at least the number of processes, {size}, got "
                f"{per_step}; raise grad_accumulation_steps to {-(-size // config.batch_size)}, or start fewer"
            )
        for number, other in enumerate(records[1:], 1):
            if differing := differences(records[0], other, of=("in the first", "there")):
                raise TrainingError(
                    "all processes of a run must have the same versions, model, images and settings, but process "
                    f"{number} differs from the first in {'; '.join(differing)}; make them alike"
                )

    processes.broadcast_from_rank0(check)


class _Run:
    def __init__(self, plan: Plan, parts: Split, host: RunHost, record: RunRecord, folder: RunFolder | None) -> None:
        job = plan.job
        self._plan = plan
        self._job = job
        self._parts = parts
        self._host = host
        self._environment = record.environment
        self._folder = folder
        self._handlers: list[EventHandler] = [host.on_event] if folder is None else [folder, host.on_event]
        self._draw = None if folder is None else host.begin(plan, folder.path)
        # Only rank 0 saves the LoRA.
        self._hashes = BaseHashes(job.model.facts.path if job.way.processes.is_first else None)
        self._results = Results(
            job,
            parts.training,
            title=plan.title,
            trigger=plan.trigger,
            record=record,
            folder=None if folder is None else folder.path,
            hashes=self._hashes,
        )
        self._validation: ValidationWatch | None = None
        by_likeness = job.config.stops_by_likeness
        if parts.held_out:
            on_best = (lambda loop: None) if by_likeness else self._results.save_best
            self._validation = ValidationWatch(job.model, parts.held_out.samples, job.config, job.way, on_best)
        self._previews: PreviewWatch | None = None
        if folder is not None and self._draw is not None:
            self._previews = PreviewWatch(self._draw, self._results.save, folder.path / PREVIEW_LORA)
        self._likeness: LikenessWatch | None = None
        if by_likeness:
            processes = job.way.processes
            self._likeness = LikenessWatch(self._previews, job.config, processes, self._results.save_best)

    def train(self, engine: Engine, start: RunState | None) -> TrainResult:
        with self._mirrored():
            return self._train(engine, start)

    def _train(self, engine: Engine, start: RunState | None) -> TrainResult:
        job, host = self._job, self._host
        loop = Loop(
            engine,
            self._parts.training,
            on_event=self._emit,
            cancelled=host.cancelled,
            watchers=self._watchers(),
            until=self._plan.until,
        )
        reason = Outcome.FAILED
        try:
            if start is not None:
                loop.load(start)
                if self._previews is not None:
                    self._previews.is_resumed = True
            elif job.config.existing_state is not None:
                loop.load(
                    job.way.processes.broadcast_from_rank0(lambda: _continued(Path(str(job.config.existing_state))))
                )
            self._announce(start)
            if start is None and loop.step:
                self._emit(Resumed(step=loop.step, message=self._how_it_continues(loop)))
            with self._tracked():
                if start is None and self._draw is not None:
                    loop.engine.restore_base_model()
                    self._emit_each(self._draw.draw_base(loop.step))
                with self._captions(), self._hashes:
                    outcome = loop.run()
                    self._hashes.wait(host.cancelled)
                    reason = outcome
        except BaseException as error:
            # Save the steps taken, whatever the error is, then raise it.
            end = RunFinished(step=loop.step, reason=reason)
            self._emit(end)
            if kept := self._salvaged(loop, end, with_extras=isinstance(error, Exception)):
                if isinstance(error, LorasmithError):
                    raise type(error)(f"{error}; {kept}") from error
                error.add_note(kept)
            raise
        result = self._results.collect(
            loop, reason, self._validation, self._kept, prefer_best=reason is Outcome.STOPPED
        )
        end = RunFinished(step=loop.step, reason=reason)
        try:
            if result.path is not None and self._draw is not None:
                loop.engine.restore_base_model()
                self._emit_each(self._draw(result.steps - job.steps_before, result.path, final=True))
            self._write_extras(result, end)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(_kept(result))
            raise
        # The end is logged last: a run that is killed before it has its report is not complete, and is resumed.
        self._emit(end)
        if self._folder is not None and self._folder.lacks_last:
            log = self._folder.path / EVENTS
            message = f"The end of the run is not in {log}, which cannot be written, so that it counts as interrupted"
            self._emit(Warned(message=f"{message}; free some space and resume it"))
        return result

    def _salvaged(self, loop: Loop, end: RunFinished, *, with_extras: bool) -> str:
        """Save the result of a failed run; returns a clause for its error, empty if no step was taken."""
        try:
            result = self._results.collect(loop, Outcome.FAILED, self._validation, self._kept, prefer_best=True)
        except Exception as error:  # such as a full disk or a lost device; the first error is the one to raise
            return f"the LoRA could not be saved ({error})"
        if result.path is None:
            return ""
        if with_extras:
            self._write_extras(result, end)
        return _kept(result)

    @property
    def _kept(self) -> ValidationWatch | LikenessWatch | None:
        """The watch that decides which LoRA is the best."""
        return self._likeness or self._validation

    def _emit_each(self, events: Generator[Event]) -> None:
        """Emit events as they come; what makes them ends before an error of a handler leaves."""
        with contextlib.closing(events):
            for event in events:
                self._emit(event)

    def _emit(self, event: Event) -> None:
        for handler in self._handlers:
            handler(event)

    def _write_extras(self, result: TrainResult, end: RunFinished) -> None:
        """Write the files beside the LoRA: loss plot, sidecars, report."""
        if (lora := result.path) is not None:
            if any(map(math.isfinite, result.losses)):
                self._extra("loss plot", lambda: result.plot(lora.with_name("loss.png")))
            self._extra("information beside it", lambda: self._host.write_beside(self._plan, lora))
        if (folder := self._folder) is not None:
            self._extra("report", lambda: self._host.write_report(folder.path, end))

    def _extra(self, what: str, make: Callable[[], object]) -> None:
        """Make an optional file, after the LoRA is saved; a failure is a warning."""
        try:
            make()
        except Exception as error:  # any: it must not cost the result
            self._emit(Warned(message=f"The LoRA is saved, but the {what} is not: {error}"))

    def _captions(self) -> contextlib.AbstractContextManager[None]:
        return captions_ready(
            self._parts.training,
            self._job.draws,
            seed=self._job.config.seed,
            on_event=self._emit,
            progress=lambda done, total: self._host.on_event(CaptionEncoded(done=done, total=total)),
            others=other_texts(self._parts.training, self._job.config),
            model=self._job.model,
        )

    @contextlib.contextmanager
    def _mirrored(self) -> Iterator[None]:
        """Inside the context, the folder is mirrored at each run state; then a last time."""
        if self._host.mirror is None or self._folder is None:
            yield
            return
        from lorasmith.training.storage.run_mirror import RunMirror, mirror_of

        mirror = RunMirror(mirror_of(self._host.mirror, self._folder.path), self._folder, self._emit)
        self._handlers.append(mirror)
        try:
            yield
        finally:
            mirror.finish()

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Inside the context, events are logged to a tracker, if `track` is set."""
        config, title = self._job.config, self._plan.title
        if config.track == "none" or self._folder is None:
            yield
            return
        from lorasmith.training.storage.trackers import tracker_for

        tracker = tracker_for(config.track, self._folder.path, title, asdict(config), on_event=self._emit)
        with contextlib.closing(tracker):
            self._handlers.append(tracker)
            yield

    def _watchers(self) -> list[Watcher]:
        """Watchers in the order of their calls.

        Validation precedes the run state that includes it, and files precede it, as a killed run continues behind it.
        """
        config, folder = self._job.config, self._folder
        watchers: list[Watcher] = [*([self._validation] if self._validation else []), EffectWatch(config)]
        if folder is not None:
            results = self._results
            saves = LoraWatch(results.save_result, results.path_at, every=config.save_every)
            if config.save_every:
                watchers.append(saves)
            if config.post_hoc_ema:
                save = self._results.save_averages
                watchers.append(AverageWatch(save, count=config.post_hoc_ema, steps=config.steps))
            watchers.append(
                StateSaver(
                    folder.states(config.keep_states, asdict(config)),
                    every=config.save_state_every,
                    minutes=config.save_state_minutes,
                    before=folder.flush,
                )
            )
            if self._previews is not None and self._likeness is None:
                watchers.append(self._previews)
        if self._likeness is not None:
            watchers.append(self._likeness)
        if folder is not None:
            draw = partial(self._host.draw, self._plan, folder.path)
            watchers.append(
                RequestWatch(folder.path, folder.path / PREVIEW_LORA, saves, results.save, self._previews, draw)
            )
        return watchers

    def _announce(self, start: RunState | None) -> None:
        """Emit the start of the run with the job's notes, or its resumption with what is not bit-identical."""
        job, folder = self._job, self._folder
        self._emit(
            RunStarted(
                steps=job.config.steps,
                steps_before=job.steps_before,
                samples=len(self._parts.training),
                adapters=len(job.all_adapters),
                parameters=job.parameters,
                device=str(job.way.device),
                dtype=dtype_name(job.way.dtype),
                folder="" if folder is None else str(folder.path),
            )
        )
        if start is None:
            for note in self._notes():
                self._emit(Warned(message=str(note), is_remark=isinstance(note, ReportNote)))
        elif folder is not None:
            reasons = list(self._inexact(folder))
            same = "bit-identically" if not reasons else f"not bit-identically, because of {'; '.join(reasons)}"
            message = f"The run in {folder.path} continues from step {start.step}, {same}."
            self._host.on_event(EarlierEvents(events=read_history(folder.path).events))
            self._emit(Resumed(step=start.step, message=message))

    def _how_it_continues(self, loop: Loop) -> str:
        config = self._job.config
        return (
            f"The run continues from step {loop.step} of {config.existing_state}, with the state of its optimizer; the "
            f"learning rate is that of the {config.schedule} schedule over {count_text(config.steps, 'step')}, "
            f"{loop.engine.learning_rate_at(loop.step):.3g} here."
        )

    def _notes(self) -> Iterator[str]:
        yield from self._job.notes
        yield from self._parts.training.notes
        if self._parts.held_out:
            yield f"{self._parts.note}." if self._parts.is_note_grave else ReportNote(f"{self._parts.note}.")
        if self._folder is None:
            if count := self._job.config.post_hoc_ema:
                yield f"post_hoc_ema {count} has no effect without a folder of the run, in which averages are saved."
            return
        kept = self._job.config.keep_states + 1  # the oldest is removed after the new one is written
        needed, free = kept * _STATE_BYTES * self._job.parameters, free_bytes(self._folder.path)
        if free <= needed:
            yield (
                f"{free / 2**30:.1f} GiB are free on the disk, and {kept} run states may take {needed / 2**30:.1f} "
                "GiB: fewer are kept if it is full; free some space, or lower keep_states."
            )

    def _inexact(self, folder: RunFolder) -> Iterator[str]:
        reasons = (
            word for before in folder.record().all_environments for word in differences(before, self._environment)
        )
        yield from dict.fromkeys(reasons)
        way = self._job.way
        if way.device.type == "cuda" and not self._job.config.deterministic:
            yield "the order of sums on a GPU, as deterministic is off"
        if way.compile and way.varying_sizes:
            yield "the sizes that blocks are compiled for first"


def _kept(result: TrainResult) -> str:
    return f"the LoRA of {count_text(result.steps, 'step')} is at {result.path}"


def _continued(path: Path) -> RunState:
    """The state of a finished run, changed so that it can be trained on, also if validation had stopped it."""
    state = load_state(path)
    return replace(state, numbers={**state.numbers, "stopped": False})
