"""Benchmark of a planned run: a few of its steps, the floor before and after them, counts, memory, device rates."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lorasmith.bench.counting import profiled
from lorasmith.bench.limits import Measured, device_memory, measured_rates
from lorasmith.bench.measure import (
    Counts,
    Spread,
    Steps,
    counted,
    frozen_floor,
    measured_parts,
    measured_steps,
    pass_seconds,
    training_steps,
    weight_bytes,
)
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Model
from lorasmith.training.engine import prepared
from lorasmith.training.job import Job, engine_of
from lorasmith.training.memory.memory_plan import MemoryPlan, plan_for
from lorasmith.training.runtime import Runtime

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
    job: Job,
    samples: Sequence[Sample],
    *,
    steps: int | None = None,
    floor: bool = True,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Measured:
    """Measure a job's steps. The model is restored afterwards; the job's adapters are trained a little.

    `steps` is the number of timed steps and passes, by default as many as take some seconds; the job's own is not used.
    With `floor` the frozen model is measured too, on one batch. `on_stage` receives the name of each stage, such as
    `steps`.
    """
    config, device = job.config, job.runtime.device
    plan = None
    if job.runtime.activations == "auto":
        on_stage("activations")
        plan = _plan(job, samples)
        runtime = replace(job.runtime, activations=plan.activations, checkpoint_depth=plan.checkpoint_depth)
        job = replace(job, runtime=runtime)
    on_stage("rates of this device")
    rates = measured_rates(device, job.runtime.dtype)
    frozen = _Floor(job, samples[: config.batch_size]) if floor else None
    if frozen is not None:
        on_stage("the floor")
        steps = frozen.measure(steps and -(-steps // 2)) * 2
    on_stage("steps")
    steady, weights, allocated = _steps(replace(job, config=replace(config, steps=_WARMUP + (steps or 5))), samples)
    on_stage("the parts of a step")
    parts = measured_parts(job, samples)
    counts = counted(lambda counter: training_steps(job, samples, counter), device)
    with training_steps(job, samples) as once:
        once()
        profile = min((profiled(once, device) for _ in range(2)), key=lambda one: one.whole)
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


def _plan(job: Job, samples: Sequence[Sample]) -> MemoryPlan:
    found: list[MemoryPlan] = []

    def planned() -> Runtime:
        found.append(plan_for(engine, samples))
        return replace(job.runtime, activations="keep")

    engine = engine_of(job)
    try:
        with engine.prepared(planned=planned):
            return found[0]
    finally:
        engine.release()


class _Floor:
    """Timed passes of the frozen model. `counts` is None before the first, or if memory is too small unquantized."""

    def __init__(self, job: Job, samples: Sequence[Sample]) -> None:
        self._job = job
        self._samples = samples
        self.passes: list[float] = []
        self.forwards: list[float] = []
        self.counts: Counts | None = None

    def measure(self, steps: int | None) -> int:
        """Time `steps` passes, or as many as take some seconds; returns their number, 0 if memory is too small."""
        device = self._job.runtime.device
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
        runtime = self._job.runtime
        return frozen_floor(
            self._job.denoiser, self._samples, device=runtime.device, dtype=runtime.dtype, backward=backward
        )


def _steps(job: Job, samples: Sequence[Sample]) -> tuple[Steps, int, int | None]:
    """The steps after the warm-up, bytes of the frozen weights, and peak of allocated GPU memory."""
    weights, device = 0, job.runtime.device

    def look() -> None:
        nonlocal weights
        weights = weight_bytes(job.denoiser.module)

    with prepared(job.denoiser, job.adapters, job.config, job.runtime, job.differences, first=look):
        pass
    if device.type != "cuda":
        return measured_steps(job, samples, warmup=_WARMUP), weights, None
    torch.cuda.reset_peak_memory_stats(device)
    steps = measured_steps(job, samples, warmup=_WARMUP)
    return steps, weights, torch.cuda.max_memory_allocated(device)


def _process_peak() -> int | None:
    """Peak memory of this process in bytes; None if the system does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
