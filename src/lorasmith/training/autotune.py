"""The fastest way to compute a step, of those that the settings leave open: timed before the first one, and kept.

Ways differ in how activations are kept, where several plans fit, in the products with quantized weights, and in whether
a pass is captured as a CUDA graph or blocks are compiled. They are tried in this order, each with what was the fastest
before, on the batches of the next step. What captures and what compiles is timed in a process of its own (`trial`),
which may crash or hang. Times are kept by machine and by what a step is (`measured_times`).

Where `autotune` is left open, a run on a GPU that takes more than ten minutes tries the ways that change no more than
the last bits, for a twentieth of its time.

The way is part of the run state, so that a resumed run keeps it, whatever would be measured then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.adapters.frozen_weights import format_in_model
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
from lorasmith.training.trial import TrialFailed, step_times
from lorasmith.training.way import Way

_LONG = 600.0  # seconds of the run's steps from which another process is worth it, or anything by default
_MOST_TUNING = 0.05  # of these seconds, that all ways together have by default
_PATIENCE = 900.0  # seconds of a process where somebody asked for it
_SHORTEST = 60.0  # seconds of a process, below which it would end without an answer

Apart = Callable[[Way, float], Times]
"""Times a way in another process, which has so many seconds; raises TrialFailed."""


@dataclass(frozen=True)
class Tuned:
    """The way that is taken, and the seconds of a step by way."""

    way: Way
    seconds: dict[Way, float]
    by_default: bool = False
    failed: dict[Way, str] = field(default_factory=dict)  # why there are no seconds, as a clause

    def __str__(self) -> str:
        times = "; ".join(f"{way}: {seconds:.3g}" for way, seconds in self.seconds.items())
        failed = "".join(f"; not {way}: {why}" for way, why in self.failed.items())
        how = "Turn autotune off" if self.by_default else "Leave autotune out"
        return f"Steps: {self.way}; seconds a step: {times}{failed}. {how} to set it yourself."


def tuned(
    engine: Engine,
    batches: Sequence[Batch],
    plans: Sequence[MemoryPlan],
    steps: int,
    emit: EventHandler = lambda event: None,
    *,
    apart: Callable[[], Apart],
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """The fastest way for an engine whose model is frozen, without adapters attached.

    Args:
        batches: of a step, on the device.
        plans: for activations, all of which fit.
        steps: number of steps that will be taken in this way.
        emit: is told how long it may take.
        apart: called before the first way that is timed so, behind all that need the frozen model.
        clock: returns seconds.
    """
    step, seconds, failed = described(engine, batches), dict[Way, float](), dict[Way, str]()

    def cost(way: Way, times: Callable[[], Times]) -> float:
        """Seconds of all steps, and of compiling."""
        try:
            found = measured(way.device, f"{step}; {way}", times)
        except TrialFailed:
            return math.inf
        if "step" in found:
            seconds[way] = found["step"]
        return steps * found.get("step", math.inf) + found.get("compiling", 0.0)

    def here(way: Way) -> Callable[[], Times]:
        return partial(_times, engine, way, batches, clock)

    best, by_default = engine.way, engine.config.autotune is None
    least = cost(best, here(best))
    if by_default and not _LONG < least < math.inf:
        return Tuned(best, seconds, by_default)
    limit = _MOST_TUNING * least if by_default else math.inf
    if by_default:
        emit(
            Warned(
                message=f"The run's steps take about {time_text(least)}: other ways to compute them are timed first, "
                f"for at most {time_text(limit)}; turn autotune off to leave that out.",
                is_remark=True,
            )
        )
    began = clock()
    changes: list[Callable[[Way], Way]] = [plan.applied for plan in plans]
    changes += [partial(_with_products, kind) for kind in _open_products(engine)]
    for change in changes:
        if (way := change(best)) == best:
            continue
        if clock() - began > limit:
            return Tuned(best, seconds, by_default)
        if (found := cost(way, here(way))) < FASTER * least:
            best, least = way, found

    trial: Apart | None = None
    for way_of in _ways_apart(engine):
        way = way_of(best)
        if way == best or least < _LONG or (way.compile and compiler(way.device) == "none"):
            continue
        if by_default and way.varying_sizes:
            continue  # later sizes are compiled or captured again, which a step of one does not show
        rest = min(limit - (clock() - began), _PATIENCE)
        if rest < _SHORTEST:
            break
        if trial is None:
            trial = apart()
            if not by_default:
                emit(
                    Warned(
                        message="Compiled blocks and CUDA graphs are timed in processes of their own, each for at most "
                        f"{time_text(rest)}; leave autotune out to train without.",
                        is_remark=True,
                    )
                )

        def times(way: Way = way, rest: float = rest, trial: Apart = trial) -> Times:
            try:
                return trial(way, rest)
            except TrialFailed as error:
                failed[way] = str(error)
                if not error.is_final:
                    raise
                return {}

        if (found := cost(way, times)) < FASTER * least:
            best, least = way, found
    return Tuned(best, seconds, by_default, failed)


def _ways_apart(engine: Engine) -> Iterator[Callable[[Way], Way]]:
    """Changes of a way that are tried in other processes."""
    if engine.way.cuda_graphs:
        return
    if engine.way.device.type == "cuda" and not engine.config.consequences().runs_on_host:
        yield _captured
    yield _compiled
    yield from (partial(_with_products, kind) for kind in _open_products(engine, is_compiled=True))


def _with_products(kind: ProductFormat, way: Way) -> Way:
    is_slow = PRODUCT_KINDS[kind].needs_compiler(way.device) and not way.compile
    return way if is_slow or way.products != "training_dtype" else replace(way, products=kind)


def _captured(way: Way) -> Way:
    return way if way.compile or way.activations == "host" else replace(way, cuda_graphs=True)


def _compiled(way: Way) -> Way:
    # Torch selects the kept activations itself.
    return replace(way, activations="keep", kept_blocks=1, compile=True, cuda_graphs=False)


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
    """As `step_times`; nothing if the way fails here."""
    try:
        return step_times(engine, way, batches, clock)
    except Exception as error:  # of a compiler, of any kind
        if has_lost_device(error) or not (way.compile or is_out_of_memory(error)):
            raise
    free_device_memory()  # outside of `except`, where the error's frames no longer hold activations
    return {}
