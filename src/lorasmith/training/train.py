"""A run as a whole: the folder of the run, continuing where it stopped, and saving what there is, whatever ends it.

What is decided before the first step is in `job`, the steps are in `loop`, what happens between them is in `watchers`,
and what a run leaves is in `results`; `app.model_run` adds previews and the page about the run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasmith.core.dtypes import dtype_name
from lorasmith.core.errors import LorasmithError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.split import Split, split
from lorasmith.training.events import Event, EventHandler, Resumed, RunFinished, RunStarted, Warned
from lorasmith.training.job import Job, engine_of, plan_job
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.memory.compilation import sizes_vary
from lorasmith.training.outcome import Outcome
from lorasmith.training.progress import RunState
from lorasmith.training.results import Results, TrainResult
from lorasmith.training.runs.fingerprint import differences
from lorasmith.training.runs.records import run_record
from lorasmith.training.runs.run_folder import RunFolder, claimed_run
from lorasmith.training.runs.run_states import StateSaver, free_bytes
from lorasmith.training.watchers import Draw, PreviewWatch, ValidationWatch

__all__ = ["Job", "Surroundings", "TrainResult", "plan_job", "run_job"]

_STATE_BYTES = 16
"""Of a run state for each trained number: the weights in fp32, their average, and two moments of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run receives besides job and data.

    Attributes:
        output: folder of the run, or a function that chooses it by the run's fingerprint; None to write nothing. A
            folder that holds the same run, interrupted, is continued.
        fresh: move a run that is there aside instead of continuing it.
        title: name of the LoRA, and of its file in `output`.
        trigger: trigger phrase, for the metadata.
        validation: images to judge the run by, instead of a share of the data.
        previews: for the folder of the run, what draws its previews; None draws none.
        page: writes the page about the run into its folder.
        source: how the run was asked for, as JSON can carry it, so that it can be repeated.
        on_event: receives typed events.
        cancelled: asked between steps; True ends the run with what there is.
        until: step of the run behind which it is cancelled; None for none.
    """

    output: Path | Callable[[Mapping[str, Any]], Path] | None = None
    fresh: bool = False
    title: str = "lora"
    trigger: str | None = None
    validation: EncodedDataset | None = None
    previews: Callable[[Path], Draw | None] = lambda folder: None
    page: Callable[[Path], object] = lambda folder: None
    source: Mapping[str, Any] = field(default_factory=dict)
    on_event: EventHandler = lambda event: None
    cancelled: Callable[[], bool] = lambda: False
    until: int | None = None


def run_job(job: Job, data: EncodedDataset, around: Surroundings) -> TrainResult:
    """Train what `plan_job` decided, where it was planned for; a job is run once.

    Raises:
        LorasmithError: the data do not fit, or the loss became non-finite. If some steps were taken and there is an
            output folder, their LoRA is in it and the message says where.
    """
    parts = split(data, share=job.config.validation_share, given=around.validation)
    job = replace(job, runtime=replace(job.runtime, varying_sizes=sizes_vary(parts.training.samples)))
    record = run_record(job, parts, title=around.title, source=around.source)
    if around.output is None:
        return _Run(job, parts, around, record, None).train(None)
    path = around.output if isinstance(around.output, Path) else around.output(record["fingerprint"])
    with claimed_run(path, record, fresh=around.fresh, tell=around.on_event) as (folder, start):
        seen = folder.environments()
        record = {**record, "environments": seen} if len(seen) > 1 else record
        return _Run(job, parts, around, record, folder).train(start)


class _Run:
    """One run: training, then what it leaves, whatever ended it."""

    def __init__(
        self, job: Job, parts: Split, around: Surroundings, record: Mapping[str, Any], folder: RunFolder | None
    ) -> None:
        self._job = job
        self._parts = parts
        self._around = around
        self._environment = record["environment"]
        self._folder = folder
        self._handlers: list[EventHandler] = [around.on_event] if folder is None else [folder, around.on_event]
        self._draw = None if folder is None else around.previews(folder.path)
        self._results = Results(
            job,
            parts.training,
            title=around.title,
            trigger=around.trigger,
            record=record,
            folder=None if folder is None else folder.path,
        )
        self._validation: ValidationWatch | None = None
        if parts.held_out:
            self._validation = ValidationWatch(
                job.denoiser, parts.held_out.samples, job.config, job.runtime, self._results.save_best
            )

    def train(self, start: RunState | None) -> TrainResult:
        """Train from the beginning, or from a state."""
        job, around = self._job, self._around
        loop = Loop(
            engine_of(job),
            self._parts.training.samples,
            tell=self._tell,
            cancelled=around.cancelled,
            watchers=self._watchers(),
            until=around.until,
        )
        reason = Outcome.FAILED
        try:
            if start is not None:
                loop.load(start)
            self._announce(start)
            with self._tracked():
                reason = loop.run()
        except BaseException as error:
            # Whatever ended the run, the steps that were taken are worth keeping; the error is raised on.
            self._tell(RunFinished(step=loop.step, reason=reason))
            if kept := self._salvaged(loop):
                if isinstance(error, LorasmithError):
                    raise type(error)(f"{error}; {kept}") from error
                error.add_note(kept)
            raise
        result = self._collected(loop, reason, prefer_best=reason is Outcome.STOPPED)
        if result.path is not None and self._draw is not None:
            for event in self._draw(result.steps - job.steps_before, result.path, final=True):
                self._tell(event)
        self._tell(RunFinished(step=loop.step, reason=reason))
        self._extra("report", self._write_report)
        return result

    def _salvaged(self, loop: Loop) -> str:
        """Save what a run leaves that failed; returns a sentence for its error, empty if nothing is left."""
        try:
            result = self._collected(loop, Outcome.FAILED, prefer_best=True)
        except Exception as error:  # such as a full disk, or a device that is gone; what failed first counts more
            return f"what there was could not be saved ({error})"
        if result.path is None:
            return ""
        self._extra("report", self._write_report)
        return f"the LoRA of {result.steps} steps is at {result.path}"

    def _collected(self, loop: Loop, reason: Outcome, *, prefer_best: bool) -> TrainResult:
        result = self._results.collect(loop, reason, self._validation, prefer_best=prefer_best)
        if (path := result.path) is not None and any(map(math.isfinite, result.losses)):
            self._extra("loss plot", lambda: result.plot(path.with_name("loss.png")))
        return result

    def _tell(self, event: Event) -> None:
        for handler in self._handlers:
            handler(event)

    def _write_report(self) -> None:
        if self._folder is not None:
            self._around.page(self._folder.path)

    def _extra(self, what: str, make: Callable[[], object]) -> None:
        """Make something that a run can do without once its LoRA is saved."""
        try:
            make()
        except Exception as error:  # whatever it is, the result is worth more
            self._tell(Warned(message=f"The LoRA is saved, but the {what} is not: {error}"))

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Numbers are sent to a tracker inside, where one is asked for."""
        config, title = self._job.config, self._around.title
        if config.track == "none" or self._folder is None:
            yield
            return
        from lorasmith.training.runs.trackers import tracker_for

        tracker = tracker_for(config.track, self._folder.path, title, asdict(config), tell=self._tell)
        with contextlib.closing(tracker):
            self._handlers.append(tracker)
            yield

    def _watchers(self) -> list[Watcher]:
        """In the order in which they are called: a run state holds the validation of its step."""
        config, folder = self._job.config, self._folder
        watchers: list[Watcher] = [self._validation] if self._validation else []
        if folder is not None:
            watchers.append(
                StateSaver(
                    folder.states(config.keep_states, asdict(config)),
                    every=config.save_state_every,
                    minutes=config.save_state_minutes,
                    before=folder.flush,
                )
            )
            if self._draw is not None:
                preview = folder.path / "preview.safetensors"
                watchers.append(PreviewWatch(self._draw, self._results.save, preview, config))
        return watchers

    def _announce(self, start: RunState | None) -> None:
        """Say that the run begins, and what people should know of it, or from where it continues and how exactly."""
        job, folder = self._job, self._folder
        self._tell(
            RunStarted(
                steps=job.config.steps,
                steps_before=job.steps_before,
                samples=len(self._parts.training),
                adapters=len(job.adapters),
                parameters=job.parameters,
                device=str(job.runtime.device),
                dtype=dtype_name(job.runtime.dtype),
                folder="" if folder is None else str(folder.path),
            )
        )
        if start is None:
            for note in self._notes():
                self._tell(Warned(message=note))
        elif folder is not None:
            found = list(self._inexact(folder))
            same = "to the bit" if not found else f"not to the bit, for what differs is {'; '.join(found)}"
            message = f"Going on with {folder.path} from step {start.step}, {same}."
            self._tell(Resumed(step=start.step, message=message))

    def _notes(self) -> Iterator[str]:
        yield from self._job.notes
        if self._parts.held_out:
            yield f"{self._parts.note}."
        if self._folder is None:
            return
        kept = self._job.config.keep_states + 1  # an older one is removed when the new one is there
        needed, free = kept * _STATE_BYTES * self._job.parameters, free_bytes(self._folder.path)
        if free <= needed:
            yield (
                f"{free / 2**30:.1f} GiB are free on the disk, and {kept} run states may take {needed / 2**30:.1f} "
                "GiB: fewer are kept where it is full; free some space, or lower keep_states."
            )

    def _inexact(self, folder: RunFolder) -> Iterator[str]:
        """What keeps the rest of a run from being the same to the bit."""
        found = (word for before in folder.environments() for word in differences(before, self._environment))
        yield from dict.fromkeys(found)
        runtime = self._job.runtime
        if runtime.device.type == "cuda" and not self._job.config.deterministic:
            yield "the order in which a GPU adds up, for deterministic is off"
        if runtime.compile and runtime.varying_sizes:
            yield "the sizes that compiled code meets first"
