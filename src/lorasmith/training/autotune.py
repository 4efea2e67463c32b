"""The fastest way to compute a step, of those that the settings leave open: timed before the first one, and kept.

Ways differ in how activations are kept, where several plans fit, in the products with quantized weights, and in whether
blocks are compiled. They are tried in this order, each with what was the fastest before, on the batches of the next
step. Times are kept by machine and by what a step is (`measured_times`).

Where `autotune` is left open, a run on a GPU that takes more than ten minutes tries the ways that change no more than
the last bits, and begins none after a twentieth of its time.

The way is part of the run state, so that a resumed run keeps it, whatever would be measured then.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.adapters.frozen_weights import format_in_model, products_enabled
from lorasmith.core.allocator import has_lost_device, is_out_of_memory
from lorasmith.core.choices import ProductFormat
from lorasmith.core.placement import dtype_name, free_device_memory
from lorasmith.core.printable import time_text
from lorasmith.core.quantized_products import PRODUCT_KINDS, has_products
from lorasmith.training.batches import Batch
from lorasmith.training.engine import Engine
from lorasmith.training.events import EventHandler, Warned
from lorasmith.training.measured_times import FASTER, Times, measured
from lorasmith.training.memory.compilation import compiler
from lorasmith.training.memory.memory_plan import MemoryPlan
from lorasmith.training.way import Way

_LONG = 600.0  # seconds of the run's steps from which compiling is tried, as it takes minutes, or anything by default
_MOST_TUNING = 0.05  # of these seconds, after which no further way is begun by default
_WARM_UP, _TIMED = 2, 3  # steps


@dataclass(frozen=True)
class Tuned:
    """The way that is taken, and the seconds of a step by way."""

    way: Way
    seconds: dict[Way, float]
    by_default: bool = False

    def __str__(self) -> str:
        times = "; ".join(f"{way}: {seconds:.3g}" for way, seconds in self.seconds.items())
        how = "Turn autotune off" if self.by_default else "Leave autotune out"
        return f"Steps: {self.way}; seconds a step: {times}. {how} to set it yourself."


def tuned(
    engine: Engine,
    batches: Sequence[Batch],
    plans: Sequence[MemoryPlan],
    steps: int,
    emit: EventHandler = lambda event: None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """The fastest way for an engine whose model is frozen, without adapters attached.

    Args:
        batches: of a step, on the device.
        plans: for activations, all of which fit.
        steps: number of steps that will be taken in this way.
        emit: is told how long it may take, where nobody asked for it.
        clock: returns seconds.
    """
    step, seconds = described(engine, batches), dict[Way, float]()

    def cost(way: Way) -> float:
        """Seconds of all steps, and of compiling."""
        times = measured(way.device, f"{step}; {way}", partial(_times, engine, way, batches, clock))
        if "step" in times:
            seconds[way] = times["step"]
        return steps * times.get("step", math.inf) + times.get("compiling", 0.0)

    best, by_default = engine.way, engine.config.autotune is None
    least = cost(best)
    if by_default and not _LONG < least < math.inf:
        return Tuned(best, seconds, by_default)
    limit = _MOST_TUNING * least if by_default else math.inf
    if by_default:
        emit(
            Warned(
                message=f"The run's steps take about {time_text(least)}: other ways to compute them are timed first, "
                f"of which none is begun after {time_text(limit)}; turn autotune off to leave that out.",
                is_remark=True,
            )
        )
    began = clock()
    changes: list[Callable[[Way], Way]] = [
        *(plan.applied for plan in plans),
        *(partial(_with_products, kind) for kind in _open_products(engine)),
        _compiled,
        *(partial(_with_products, kind) for kind in _open_products(engine, is_compiled=True)),
    ]
    for change in changes:
        way = change(best)
        if way == best or (way.compile and (least < _LONG or compiler(way.device) == "none")):
            continue
        if by_default and way.compile and way.varying_sizes:
            continue  # whose later sizes may be compiled again, which a step of one does not show
        if clock() - began > limit:
            break
        if (found := cost(way)) < FASTER * least:
            best, least = way, found
    return Tuned(best, seconds, by_default)


def _with_products(kind: ProductFormat, way: Way) -> Way:
    is_slow = PRODUCT_KINDS[kind].needs_compiler(way.device) and not way.compile
    return way if is_slow or way.products != "training_dtype" else replace(way, products=kind)


def _compiled(way: Way) -> Way:
    if way.cuda_graphs:
        return way
    return replace(way, activations="keep", kept_blocks=1, compile=True)  # torch selects the kept activations itself


def _open_products(engine: Engine, *, is_compiled: bool = False) -> Sequence[ProductFormat]:
    """Formats of products that the frozen weights and the device have, if none is set: those that are fast without a
    compiler, or the others. They round more than the last bits, so that somebody must ask for them."""
    if engine.way.products != "training_dtype" or engine.config.autotune is None:
        return ()
    formats = {format_in_model(layer) for layer in packable_layers(engine.model.module)}
    kinds = {one.products for one in formats if one is not None and has_products(one.products, engine.way.device)}
    return sorted(kind for kind in kinds if PRODUCT_KINDS[kind].needs_compiler(engine.way.device) == is_compiled)


def described(engine: Engine, batches: Sequence[Batch]) -> str:
    """What a step's time depends on, beside its way and the machine."""
    module, config, way = engine.model.module, engine.config, engine.way
    numbers = sum(parameter.numel() for parameter in module.parameters())
    sizes = [
        (tuple(batch.noised.shape), *(tuple(t.shape) for t in batch.conditioning.tensors.values())) for batch in batches
    ]
    offloaded = ", offloaded" if way.offloading else ""
    return (
        f"step of {type(module).__name__} with {numbers} numbers in {dtype_name(way.dtype)}, quantization "
        f"{config.quantization}{offloaded}; {config.algorithm} with {engine.flat.master.numel()} numbers; {sizes}"
    )


def _times(engine: Engine, way: Way, batches: Sequence[Batch], clock: Callable[[], float]) -> Times:
    """Seconds of a step (`step`) and of compiling once (`compiling`); nothing if the way fails here."""
    before, engine.way = engine.way, way
    try:
        with contextlib.ExitStack() as stack:
            if way.products != before.products:
                stack.enter_context(products_enabled(engine.model.module, way.products, before.device))
            stack.enter_context(engine.attached())
            first = _seconds(engine, batches, 1, clock)
            _seconds(engine, batches, _WARM_UP, clock)
            step = _seconds(engine, batches, _TIMED, clock) / _TIMED
        return {"step": step, "compiling": max(first - step, 0.0)} if way.compile else {"step": step}
    except Exception as error:  # of a compiler, of any kind
        if has_lost_device(error) or not (way.compile or is_out_of_memory(error)):
            raise
    finally:
        engine.way = before
    free_device_memory()  # outside of `except`, where the error's frames no longer hold activations
    return {}


def _seconds(engine: Engine, batches: Sequence[Batch], count: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(count):
        engine.gradient(batches)
    if engine.way.device.type == "cuda":
        torch.cuda.synchronize(engine.way.device)
    return clock() - began
