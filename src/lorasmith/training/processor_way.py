"""How a run computes on a processor: the format of its products by measured steps, its threads by what is free.

Units for a format make large products faster, and small ones slower where numbers are converted first. So steps of the
run itself are timed: bf16 on all threads, fp32 if the settings leave the format open, and the faster one on half of the
threads. Times are kept (`measured_times`). Short runs measure nothing, nor do busy machines: beside other programs
there is a thread for each free processor (`core.processor`).

Both change the numbers of a run. The format is a setting of the record, the threads are in its environment, and a run
that continues in its folder keeps both.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.placement import chosen_dtype, free_memory
from lorasmith.core.printable import count_text
from lorasmith.core.processor import BUSY, busy_processors, threads_are_set, threads_beside, usable_processors
from lorasmith.data.dataset import Sample
from lorasmith.training.autotune import described
from lorasmith.training.batches import Batch, stand_in_captions
from lorasmith.training.config import DtypeSetting
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import TrainJob, engine_of
from lorasmith.training.measured_times import FASTER, Times, measured
from lorasmith.training.notes import ReportNote

_WORTH_STEPS = 100  # of a run from which formats are measured, as that takes up to nine
_TIMED = 2  # steps, after one that warms up
_HOPELESS = 2.0  # times the best step, from which the first one of another way is enough
_FREE_SHARE = 0.5  # of free memory that weights in fp32 may take
_LOOKS = 3  # at a busy machine, the quietest of which counts for the whole run: a page that opens is soon done


@dataclass(frozen=True)
class ProcessorWay:
    """A format of products and a number of threads."""

    dtype: DtypeSetting
    threads: int

    def __str__(self) -> str:
        return f"{self.dtype} on {count_text(self.threads, 'thread')}"


@dataclass(frozen=True)
class Load:
    """What a machine has for a run's threads."""

    threads: int  # that may compute
    busy: float  # processors that other programs keep busy
    is_set: bool  # by the environment

    @classmethod
    def now(cls, *, always: bool = False) -> Load:
        """Measured in a fifth of a second, again if busy; not if the number of threads is given, unless `always`."""
        threads, is_set = torch.get_num_threads(), threads_are_set()
        if is_set or threads == 1:
            return cls(threads, busy_processors() if always else 0.0, is_set=True)
        busy = busy_processors()
        for _ in range(_LOOKS - 1):
            if busy < BUSY:
                break
            busy = min(busy, busy_processors())
        return cls(min(threads, usable_processors()), busy, is_set=False)

    @property
    def is_quiet(self) -> bool:
        return self.busy < BUSY

    @property
    def chosen(self) -> int:
        """Threads beside what is busy."""
        return self.threads if self.is_set or self.is_quiet else threads_beside(self.threads, self.busy)

    @property
    def note(self) -> str:
        """What slows a run down, as a clause; empty on a quiet machine."""
        if self.is_quiet:
            return ""
        return (
            f"other programs keep {self.busy:.1f} of {usable_processors()} processors busy, so that steps take longer, "
            f"on {count_text(self.chosen, 'thread')}; close them for full speed"
        )


@contextlib.contextmanager
def on_processor(
    job: TrainJob,
    samples: Sequence[Sample],
    *,
    begun: Callable[[tuple[DtypeSetting, ...]], ProcessorWay | None] = lambda formats: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[TrainJob]:
    """Inside the context, torch has the threads of a job on the CPU; yields the job with its format and notes.

    `begun` returns the way of the run that this one continues, with one of the formats that are open. Nothing is
    chosen for GPUs, for runs of several processes, and for the threads that the environment sets; with `deterministic`
    neither measurements nor other programs choose.
    """
    config, before = job.config, torch.get_num_threads()
    if job.way.device.type != "cpu" or job.way.processes.size > 1 or config.deterministic:
        yield job
        return
    formats, load, notes = _open_formats(job), Load.now(), list[str]()
    kept = None if load.is_set and len(formats) == 1 else begun(formats)
    way = ProcessorWay(config.training_dtype, load.chosen)
    try:
        if kept is not None:
            way = replace(kept, threads=load.threads if load.is_set else min(kept.threads, load.threads))
        elif not load.is_quiet:
            notes.append(f"{load.note.capitalize()}.")
        elif _is_worth_it(job, formats, load):
            way, seconds = fastest_way(job, samples, formats, load, cancelled=cancelled)
            times = ", ".join(f"{threads}: {time:.3g}" for threads, time in seconds.items())
            notes.append(ReportNote(f"Products in {way}; seconds a step: {times}. Set training_dtype to choose one."))
        torch.set_num_threads(way.threads)
        yield replace(_in_format(job, way.dtype), notes=(*job.notes, *notes))
    finally:
        torch.set_num_threads(before)


def fastest_way(
    job: TrainJob,
    samples: Sequence[Sample],
    formats: Sequence[DtypeSetting],
    load: Load,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ProcessorWay, dict[ProcessorWay, float]]:
    """The fastest way of a job that has no engine yet, and the seconds of a step by way; the first one wins a draw."""
    seconds = dict[ProcessorWay, float]()
    best = ProcessorWay(formats[0], load.threads)

    def is_faster(way: ProcessorWay) -> bool:
        if cancelled():
            return False
        torch.set_num_threads(way.threads)
        least = seconds.get(best, math.inf)
        with _engine_for(_in_format(job, way.dtype)) as engine:
            data = stand_in_captions(samples)
            batches = batch_maker(engine.model, data, engine.config, engine.way, engine.rank_masks).step(0)
            name = f"{described(engine, batches)}; {way}"
            times = measured(engine.way.device, name, partial(_times, engine, batches, least, clock))
        if "step" in times:
            seconds[way] = times["step"]
        return seconds.get(way, math.inf) < FASTER * least

    for dtype in formats:
        if is_faster(way := ProcessorWay(dtype, load.threads)):
            best = way
    while not load.is_set and best.threads > 1:
        if not is_faster(way := ProcessorWay(best.dtype, best.threads // 2)):
            break
        best = way
    return best, seconds


def _times(engine: Engine, batches: Sequence[Batch], least: float, clock: Callable[[], float]) -> Times:
    """Seconds of a step (`step`); nothing if memory is too small."""

    def seconds() -> float:
        began = clock()
        engine.gradient(batches)
        return clock() - began

    try:
        # Code of users may draw from torch's own stream.
        with torch.random.fork_rng(devices=[]), engine.prepared():
            first = seconds()
            return {"step": first if first > _HOPELESS * least else min(seconds() for _ in range(_TIMED))}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {}


@contextlib.contextmanager
def _engine_for(job: TrainJob) -> Iterator[Engine]:
    engine = engine_of(job)
    try:
        yield engine
    finally:
        engine.release()


def _in_format(job: TrainJob, dtype: DtypeSetting) -> TrainJob:
    return replace(
        job,
        config=replace(job.config, training_dtype=dtype),
        way=replace(job.way, dtype=chosen_dtype(dtype, job.model.module)),
    )


def _open_formats(job: TrainJob) -> tuple[DtypeSetting, ...]:
    """The formats that a run may have, that of the device's units first; several if the settings leave it open."""
    if job.requested.training_dtype == "auto" and job.config.training_dtype == "bf16":
        return "bf16", "fp32"
    return (job.config.training_dtype,)


def _is_worth_it(job: TrainJob, formats: Sequence[DtypeSetting], load: Load) -> bool:
    """Whether there is a choice, the run is long enough to measure steps, and memory is not what limits it."""
    config, is_open = job.config, len(formats) > 1 or not load.is_set
    if not is_open or config.steps < _WORTH_STEPS or config.compile:
        return False
    weights = 4 * sum(parameter.numel() for parameter in job.model.module.parameters())
    is_roomy = config.activations != "auto" and config.memory_budget is None
    return is_roomy and weights < _FREE_SHARE * free_memory(job.way.device)
