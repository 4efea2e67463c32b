"""Benchmark of a planned run: a few of its steps, the floor before and after them, counts, memory, device rates.

What limits a step is named from shares of its time: the profiler divides it into products, other operations and the
time between operations; the optimizer, waiting for batches and transfers are measured separately.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasmith.bench.measure import (
    Counts,
    PartTimes,
    Profile,
    Spread,
    Steps,
    counted,
    frozen_floor,
    measured_parts,
    measured_steps,
    pass_seconds,
    profiled,
    training_steps,
    weight_bytes,
)
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.training.engine import prepared
from lorasmith.training.events import EventHandler
from lorasmith.training.job import TrainJob, engine_of
from lorasmith.training.memory.memory_plan import MemoryPlan, plan_for

_WARMUP = 2
_ENOUGH_S = 6.0  # total seconds of steps and passes if their number is not given


def latent_side(model: Model, resolution: int | None) -> int:
    """Side of the latents of square pictures of a resolution, None for the model's own. Raises OptionError."""
    side, multiple = resolution or model.defaults.resolution, model.defaults.pixel_multiple
    if side < multiple or side % multiple:
        nearest = max(multiple, round(side / multiple) * multiple)
        raise OptionError(f"resolution must be a multiple of {multiple} for this model, got {side}; use {nearest}")
    return side // model.components.latent.downscale


def measured(
    job: TrainJob,
    samples: Sequence[Sample],
    *,
    steps: int | None = None,
    floor: bool = True,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Measured:
    """Measure a job's steps. The model is restored afterwards; the job's adapters are trained a little.

    `steps` is the number of timed steps and passes, by default as many as take some seconds; the job's own is not used.
    With `floor` the frozen model is measured too, on one batch. `on_stage` receives the name of each stage, such as
    `steps`, before it and during it; what it raises ends the measurement.
    """
    config, device = job.config, job.way.device
    plan = None
    if job.way.activations == "auto":
        on_stage("activations")
        plan = _plan(job, samples)
        job = replace(job, way=plan.applied(job.way))
    on_stage("rates of this device")
    rates = measured_rates(device, job.way.dtype)
    frozen = _Floor(job, samples[: config.batch_size]) if floor else None
    if frozen is not None:
        on_stage("the floor")
        steps = frozen.measure(steps and -(-steps // 2)) * 2
    timed = replace(job, config=replace(config, steps=_WARMUP + (steps or 5)))
    steady, weights, allocated = _steps(timed, samples, lambda event: on_stage("steps"))
    on_stage("the parts of a step")
    parts = measured_parts(job, samples)
    on_stage("the operations of a step")
    counts = counted(lambda counter: training_steps(job, samples, counter), device)
    with training_steps(job, samples) as once:
        once()
        profile = min((profiled(once, device) for _ in range(2)), key=lambda taken: taken.whole)
    if frozen is not None and frozen.counts is not None:
        on_stage("the floor again")
        frozen.measure(len(frozen.passes))
    fits = frozen is not None and frozen.counts is not None
    return Measured(
        plan=plan,
        step=steady.seconds,
        waited=steady.waited,
        images=config.samples_per_step,
        parts=parts,
        counts=counts,
        profile=profile,
        floor=Spread(tuple(frozen.passes)) if frozen is not None and fits else None,
        forward=Spread(tuple(frozen.forwards)) if frozen is not None and fits else None,
        floor_counts=None if frozen is None else frozen.counts,
        passes=config.grad_accumulation_steps,
        weights=weights,
        above=counts.peak if allocated is None else allocated - weights,
        peak=_process_peak() or weights + counts.peak if allocated is None else allocated,
        memory=device_memory(device),
        rates=rates,
    )


def _plan(job: TrainJob, samples: Sequence[Sample]) -> MemoryPlan:
    engine = engine_of(job)
    try:
        with engine.frozen(), engine.adapted():
            return plan_for(engine, samples)
    finally:
        engine.release()


class _Floor:
    """Timed passes of the frozen model. `counts` is None before the first, or if memory is too small unquantized."""

    def __init__(self, job: TrainJob, samples: Sequence[Sample]) -> None:
        self._job = job
        self._samples = samples
        self.passes: list[float] = []
        self.forwards: list[float] = []
        self.counts: Counts | None = None

    def measure(self, steps: int | None) -> int:
        """Time `steps` passes, or as many as take some seconds; returns their number, 0 if memory is too small."""
        device = self._job.way.device
        try:
            with self._open() as once, self._open(backward=False) as forward:
                first = pass_seconds(once, steps=1, warmup=1, device=device).median
                steps = steps or max(2, min(10, int(_ENOUGH_S / 5 / first)))
                self.passes += pass_seconds(once, steps=steps, device=device).seconds
                self.forwards += pass_seconds(forward, steps=steps, warmup=1, device=device).seconds
                if self.counts is None:
                    self.counts = counted(lambda counter: contextlib.nullcontext(once), device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return 0
        return steps

    def _open(self, *, backward: bool = True) -> contextlib.AbstractContextManager[Callable[[], None]]:
        way = self._job.way
        return frozen_floor(self._job.model, self._samples, device=way.device, dtype=way.dtype, backward=backward)


def _steps(job: TrainJob, samples: Sequence[Sample], on_event: EventHandler) -> tuple[Steps, int, int | None]:
    """The steps after the warm-up, bytes of the frozen weights, and peak of allocated GPU memory."""
    weights, device = 0, job.way.device

    def look() -> None:
        nonlocal weights
        weights = weight_bytes(job.model.module)

    with prepared(job.model, job.adapters, job.config, job.way, job.differences, first=look):
        pass
    if device.type != "cuda":
        return measured_steps(job, samples, warmup=_WARMUP, on_event=on_event), weights, None
    torch.cuda.reset_peak_memory_stats(device)
    steps = measured_steps(job, samples, warmup=_WARMUP, on_event=on_event)
    return steps, weights, torch.cuda.max_memory_allocated(device)


def _process_peak() -> int | None:
    """Peak memory of this process in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_LONG_ENOUGH_S = 0.02
_PINNED_BYTES = 2**26


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device."""

    products: float  # FLOP/s of a large matrix product in the training dtype
    copies: float | None  # bytes/s from pinned host memory; None on the CPU


@dataclass(frozen=True)
class Measured:
    """Measurements of a step and of the floor (None if that does not fit into memory); memory in bytes."""

    plan: MemoryPlan | None  # None unless activations is auto
    step: Spread  # seconds
    waited: Spread  # seconds of each step's wait for its batches
    images: int  # per step
    parts: PartTimes
    counts: Counts
    profile: Profile
    floor: Spread | None  # the frozen model's forward and backward pass
    floor_counts: Counts | None
    forward: Spread | None  # the frozen model's forward pass alone
    passes: int  # batches per step (gradient accumulation)
    weights: int  # the frozen weights on the device
    above: int  # peak of a step, above the frozen weights
    peak: int  # of the process on the device
    memory: int | None  # of the device; None if unknown
    rates: Rates

    @property
    def images_per_hour(self) -> float:
        return 3600 * self.images / self.step.median

    @property
    def waiting(self) -> float:
        """Share of the steps' time spent waiting for batches, 0 to 1."""
        return Steps(self.step, self.waited).waiting

    @property
    def of_floor(self) -> float | None:
        """The floor's time divided by the step's: 1 is the optimum."""
        return None if self.floor is None else self.passes * self.floor.median / self.step.median

    @property
    def extra_flops(self) -> float:
        """Share of the FLOPs beyond the floor's, from recomputing and the adapters."""
        if self.floor_counts is None or not self.counts.flops:
            return 0.0
        return max(0.0, 1 - self.passes * self.floor_counts.flops / self.counts.flops)

    @property
    def efficiency(self) -> float:
        """Rate of the step's products divided by that of a large product; 0 without products."""
        seconds = self.step.median * self.profile.products / self.profile.whole
        return self.counts.flops / seconds / self.rates.products if seconds else 0.0


@dataclass(frozen=True)
class Share:
    """A part of a step's time."""

    name: str
    of_step: float  # 0 to 1
    words: str  # explanation and remedy


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of a device, in about a second."""
    copies = None
    if device.type == "cuda":
        waiting = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
        copies = _PINNED_BYTES / _best(lambda: waiting.to(device, non_blocking=True), device)
    return Rates(_product_rate(device, dtype), copies)


def shares(measured: Measured) -> list[Share]:
    """The three parts of a step, the largest first; they sum to 1."""
    profile, counts = measured.profile, measured.counts
    longest = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in list(profile.longest.items())[:3])
    found = [
        Share("products", profile.products / profile.whole, _on_products(measured)),
        Share(
            "other operations",
            profile.others / profile.whole,
            "additions, norms, activations and copies, limited by memory bandwidth rather than arithmetic; the longest "
            f"operations were {longest}",
        ),
        Share(
            "between operations",
            profile.between / profile.whole,
            f"Python and launching {counts.operations:,} operations, with the device idle; use larger batches or fewer "
            "targets",
        ),
    ]
    return sorted(found, key=lambda share: share.of_step, reverse=True)


def limits(measured: Measured) -> list[str]:
    """Sentences about what limits the step; the first is about the largest share."""
    sentences = [f"{share.name.capitalize()}, {share.of_step:.0%}: {share.words}." for share in shares(measured)]
    return [*sentences, *_on_parts(measured), *_on_memory(measured)]


def _on_products(measured: Measured) -> str:
    counts, rates, reached = measured.counts, measured.rates, measured.efficiency
    words = (
        f"{counts.flops / 1e9:,.1f} GFLOP, at {reached:.0%} of the {rates.products / 1e9:,.0f} GFLOP/s that a large "
        "matrix product reaches here"
    )
    if reached < 0.5:
        words += "; they are small or narrow, so larger batches or pictures use the device better"
    if measured.extra_flops > 0.15:
        words += f"; {measured.extra_flops:.0%} of them are not in the floor: recomputing and the adapters"
    return words


def _on_parts(measured: Measured) -> Iterator[str]:
    step, parts, counts, rates = measured.step.median, measured.parts, measured.counts, measured.rates
    if measured.waiting > 0.05:
        yield (
            f"Waiting for batches, {measured.waiting:.0%}: making one takes {_ms(parts.making)}; use smaller "
            "pictures or more processor cores."
        )
    if parts.update > 0.05 * step:
        yield (
            f"The optimizer, {parts.update / step:.0%}: {_ms(parts.update)}; use a lower rank, fewer targets, or "
            "grad_accumulation_steps to run it less often."
        )
    if counts.sent and rates.copies:
        needed = counts.sent / rates.copies
        yield (
            f"Transfers: {counts.sent / 2**20:,.0f} MiB are copied from the host in each step, which takes "
            f"{needed / step:.0%} of its time, partly concurrent; quantization makes them smaller."
        )
    if parts.busy is not None and parts.busy < 0.8:
        yield (
            f"The processor cores are busy for {parts.busy:.0%} of the time: other programs use them, or some work is "
            "single-threaded."
        )


def _on_memory(measured: Measured) -> Iterator[str]:
    if measured.memory is not None and measured.peak > 0.9 * measured.memory:
        yield (
            f"Memory is near its limit: {measured.peak / measured.memory:.0%} of {measured.memory / 2**30:.1f} GiB; "
            "use activations auto, quantization or a smaller batch."
        )


def device_memory(device: torch.device) -> int | None:
    """Memory in bytes of the device or, on the CPU, available to this process; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product large enough to be measured."""
    side = 512
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(functools.partial(torch.mm, a, b), device)
        if seconds >= _LONG_ENOUGH_S or side >= 8192:
            return 2.0 * side**3 / seconds
        side *= 2


def _best(once: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of four calls, which other load on the machine affects least."""
    return pass_seconds(once, steps=4, device=device).low


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
