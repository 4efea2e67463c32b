"""The fastest way to compute a step, of those that the settings leave open: timed before the first one, and kept.

Ways differ in how activations are kept, where several plans fit, in the products with quantized weights, and in whether
blocks are compiled. They are tried in this order, each with what was the fastest before, on the batches of the next
step. Times are kept by machine and by what a step is (`measured_times`).

The way is part of the run state, so that a resumed run keeps it, whatever would be measured then.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.adapters.frozen_weights import format_in_model, products_enabled
from lorasmith.core.allocator import has_lost_device, is_out_of_memory
from lorasmith.core.choices import ActivationPlan, ProductFormat
from lorasmith.core.placement import dtype_name, free_device_memory
from lorasmith.core.quantized_products import has_products
from lorasmith.training.batches import Batch
from lorasmith.training.engine import Engine
from lorasmith.training.measured_times import FASTER, Times, measured
from lorasmith.training.memory.compilation import compiler
from lorasmith.training.memory.memory_plan import MemoryPlan, recomputed_blocks

_WORTH_COMPILING = 600.0  # seconds of the run's steps from which it is tried, as it takes minutes
_WARM_UP, _TIMED = 2, 3  # steps


@dataclass(frozen=True)
class Way:
    """A way to compute a step; fields as of `Runtime`."""

    activations: ActivationPlan
    checkpoint_depth: int
    products: ProductFormat
    compile: bool
    kept_blocks: int = 1

    @classmethod
    def of(cls, engine: Engine) -> Way:
        """That of an engine now."""
        runtime = engine.runtime
        depth, kept = runtime.checkpoint_depth, runtime.kept_blocks
        return cls(runtime.activations, depth, runtime.products, runtime.compile, kept)

    def __str__(self) -> str:
        kept: str = self.activations
        if self.checkpoint_depth:
            kept = f"{recomputed_blocks(self.kept_blocks)} recomputed at depth {self.checkpoint_depth}"
        products = "" if self.products == "training_dtype" else f"products in {self.products}"
        return ", ".join(filter(None, (kept, products, "compiled" if self.compile else "")))


@dataclass(frozen=True)
class Tuned:
    """The way that is taken, and the seconds of a step by way."""

    way: Way
    seconds: dict[Way, float]

    def __str__(self) -> str:
        times = "; ".join(f"{way}: {seconds:.3g}" for way, seconds in self.seconds.items())
        return f"Steps: {self.way}; seconds a step: {times}. Leave autotune out to set it yourself."


def tuned(
    engine: Engine,
    batches: Sequence[Batch],
    plans: Sequence[MemoryPlan],
    steps: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """The fastest way for an engine whose model is frozen, without adapters attached.

    Args:
        batches: of a step, on the device.
        plans: for activations, all of which fit.
        steps: number of steps that will be taken in this way.
        clock: returns seconds.
    """
    step, seconds = described(engine, batches), dict[Way, float]()

    def cost(way: Way) -> float:
        """Seconds of all steps, and of compiling."""
        times = measured(engine.runtime.device, f"{step}; {way}", partial(_times, engine, way, batches, clock))
        if "step" in times:
            seconds[way] = times["step"]
        return steps * times.get("step", math.inf) + times.get("compiling", 0.0)

    best = Way.of(engine)
    least = cost(best)
    changes: list[dict[str, Any]] = [
        *(plan.runtime_settings for plan in plans),
        *({"products": kind} for kind in _open_products(engine)),
        {"activations": "keep", "kept_blocks": 1, "compile": True},  # torch.compile selects the kept activations itself
    ]
    for change in changes:
        way = replace(best, **change)
        if way == best or (way.compile and (least < _WORTH_COMPILING or compiler(engine.runtime.device) == "none")):
            continue
        if (found := cost(way)) < FASTER * least:
            best, least = way, found
    return Tuned(best, seconds)


def _open_products(engine: Engine) -> set[ProductFormat]:
    """Formats of products that the frozen weights and the device have, if none is set."""
    if engine.runtime.products != "training_dtype":
        return set()
    formats = {format_in_model(layer) for layer in packable_layers(engine.model.module)}
    return {one.products for one in formats if one is not None and has_products(one.products, engine.runtime.device)}


def described(engine: Engine, batches: Sequence[Batch]) -> str:
    """What a step's time depends on, beside its way and the machine."""
    module, config, runtime = engine.model.module, engine.config, engine.runtime
    numbers = sum(parameter.numel() for parameter in module.parameters())
    sizes = [(tuple(one.noised.shape), *(tuple(t.shape) for t in one.conditioning.tensors.values())) for one in batches]
    offloaded = ", offloaded" if runtime.offloading else ""
    return (
        f"step of {type(module).__name__} with {numbers} numbers in {dtype_name(runtime.dtype)}, quantization "
        f"{config.quantization}{offloaded}; {config.algorithm} with {engine.flat.master.numel()} numbers; {sizes}"
    )


def _times(engine: Engine, way: Way, batches: Sequence[Batch], clock: Callable[[], float]) -> Times:
    """Seconds of a step (`step`) and of compiling once (`compiling`); nothing if the way fails here."""
    before = engine.runtime
    engine.change(**asdict(way))
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
        engine.runtime = before
    free_device_memory(before.device)  # outside of `except`, where the error's frames no longer hold activations
    return {}


def _seconds(engine: Engine, batches: Sequence[Batch], count: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(count):
        engine.gradient(batches)
    if engine.runtime.device.type == "cuda":
        torch.cuda.synchronize(engine.runtime.device)
    return clock() - began
