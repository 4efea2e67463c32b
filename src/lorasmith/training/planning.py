"""Chooses what the settings of a step leave open, by measurement, before the first step.

Attention, activations and the share of offloaded blocks are measured in this order, each with what was chosen before
it, and with `autotune` whole steps are timed afterwards (`autotune`). A run that resumes has the choices of its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lorasmith.adapters.weight_stream import share_within, streams_of
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.placement import free_device_memory
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.attention import calls_in, fastest_kernel
from lorasmith.training.autotune import Apart, tuned
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.events import AttentionPlanned, Autotuned, EventHandler, Planned, Warned
from lorasmith.training.memory.memory_plan import (
    MemoryPlan,
    fitting_plans,
    free_bytes,
    largest_pass,
    measured_plans,
    plan_for,
)
from lorasmith.training.trial import timed_apart


def choose_way(
    engine: Engine,
    samples: Sequence[Sample] | EncodedDataset,
    emit: EventHandler,
    *,
    step: int,
    steps: int,
    thaw: Callable[[], object],
    cancelled: Callable[[], bool] = lambda: False,
) -> bool:
    """Complete the way of an engine whose model is frozen, with nothing attached, for `steps` steps from `step`.

    Returns whether the model must be frozen again for it; `thaw` makes it as it was, for processes that time a way.
    Without steps nothing is tuned.
    """
    before, plans = engine.way, list[MemoryPlan]()
    is_tuned = before.autotune and steps > 0
    if before.is_open:
        with engine.adapted():
            _measure(engine, tuple(samples), emit)
            chosen = engine.way
            if is_tuned and before.activations == "auto" and (chosen.checkpoint_depth or chosen.activations != "keep"):
                # Free memory is measured again, so that of the blocks another number may be kept.
                plans += [
                    plan
                    for plan in fitting_plans(engine, tuple(samples))
                    if plan.kept_blocks == 1 or chosen.kept_blocks == 1
                ]
    if not is_tuned:
        return False
    maker = batch_maker(engine.model, samples, engine.config, engine.way, engine.rank_masks)
    batches, is_thawed = maker.step(engine.steps_before + step), False

    def apart() -> Apart:
        nonlocal is_thawed
        is_thawed = True
        thaw()
        free_device_memory()
        return lambda way, limit_s: timed_apart(engine, way, batches, limit_s, cancelled=cancelled)

    found = tuned(engine, batches, plans, steps, emit, apart=apart)
    engine.way = replace(found.way, autotune=False)
    if not found.by_default or len(found.seconds) + len(found.failed) > 1:
        emit(Autotuned(seconds={str(way): seconds for way, seconds in found.seconds.items()}, message=str(found)))
    return is_thawed or found.way.products != before.products


def _measure(engine: Engine, samples: Sequence[Sample], emit: EventHandler) -> None:
    if engine.way.attention == "auto":
        emit(_plan_attention(engine, samples))
    if engine.way.activations == "auto":
        emit(_plan_activations(engine, samples))
    if engine.way.is_share_open:
        _plan_offloading(engine, samples, emit)


def _plan_attention(engine: Engine, samples: Sequence[Sample]) -> AttentionPlanned:
    way = engine.way
    try:
        calls = calls_in(largest_pass(engine.model, samples, engine.config, way))
    except (RuntimeError, MemoryError) as error:
        if way.sharding or not is_out_of_memory(error):
            raise
        calls = []  # smaller micro-batches are left to `Recovery`
    chosen = way.processes.broadcast_from_rank0(lambda: fastest_kernel(calls, way.device))
    engine.way = replace(way, attention=chosen.kernel)
    return AttentionPlanned(kernel=chosen.kernel, message=str(chosen))


def _plan_activations(engine: Engine, samples: Sequence[Sample]) -> Planned | Warned:
    try:
        plan = plan_for(engine, samples)
    except (RuntimeError, MemoryError) as error:
        if engine.way.sharding or not is_out_of_memory(error):
            raise
        # Smaller micro-batches are left to `Recovery`.
        engine.way = replace(engine.way, activations="keep", checkpoint_depth=1)
        return Warned(message="Memory ran out while activations were measured: blocks are recomputed.")
    engine.way = plan.applied(engine.way)
    return Planned(
        activations=plan.activations,
        checkpoint_depth=plan.checkpoint_depth,
        kept_blocks=plan.kept_blocks,
        needed_bytes=plan.needed_bytes,
        budget_bytes=plan.budget_bytes,
        message=str(plan),
    )


def _plan_offloading(engine: Engine, samples: Sequence[Sample], emit: EventHandler) -> None:
    """Keep as many of the offloaded blocks on the device as a step leaves memory for."""
    model, way, share = engine.model, engine.way, 1.0
    streams = streams_of(model.module) | (streams_of(model.encoders) if model.encoders is not None else set())
    if not streams:  # another program offloads
        engine.way = replace(way, offloading_share=1.0)
        return
    kind, free = "keep" if way.activations == "host" else way.activations, free_bytes(engine)
    try:
        for plan in measured_plans(model, samples, engine.config, way, free):
            if plan.checkpoint_depth or (plan.activations == kind and not way.checkpoint_depth):
                share = share_within(streams, plan.budget_bytes - plan.needed_bytes)
                break
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    share = max(way.processes.gathered(share))
    engine.way = replace(way, offloading_share=share)
    for stream in streams:
        stream.keep(share)
    emit(Warned(message=f"Offloading keeps {share:.0%} of the blocks in host memory.", is_remark=True))
