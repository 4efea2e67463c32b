"""Selection of the activation plan by measurement: the cheapest plan that fits the memory budget.

A probe runs the forward pass of a step on the largest picture, once per plan, and frees each saved tensor once its size
is recorded, so that it fits where training would not. Sizes per block in the first run give the memory of activation
checkpointing at each depth. The plans, cheapest first:

    keep        nothing is recomputed
    lean        cheap results are recomputed                                     see `activations`
    selective   also the outputs of widening layers                              see `activations`
    depth d     blocks are recomputed, at the depth that needs least memory      see `activations`

If `keep` does not fit, there is one more: depth d without as many of the last blocks as memory holds. It is before or
after the other two by its time, which is estimated from the number of recomputed blocks. Offloading has none, so that
memory is left for weights that stay on the device, unless its share is set.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lorasmith.adapters.inject import restore_forward
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.choices import Activations
from lorasmith.core.kept_values import Kept, KeptValues, changes_watched
from lorasmith.core.options import options_of
from lorasmith.core.placement import free_memory
from lorasmith.core.printable import memory_text
from lorasmith.core.processes import ALONE
from lorasmith.core.recomputation import KEPT_SHARE
from lorasmith.data.dataset import Sample
from lorasmith.families.token_routing import tokens_routed
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.engine import Engine, batch_maker, changes_in_place
from lorasmith.training.memory.activations import (
    Recipe,
    activations_reduced,
    held_by,
    recipes_recorded,
)
from lorasmith.training.methods.method_settings import MethodSettings
from lorasmith.training.trainable import Trainable
from lorasmith.training.way import Way, recomputed_blocks

_DEPTHS = 5
_EXTRA_TIME: dict[str, float] = {"keep": 0.0, "lean": 0.04, "selective": 0.14}  # see `MemoryPlan.extra_time`
_ALL_RECOMPUTED = 0.3
_SHARE = 0.9  # of free memory; the rest is for fragmentation and other programs
_TRANSIENT = 6  # times the largest saved tensor: temporary memory of a product and its gradients


@dataclass(frozen=True)
class MemoryPlan:
    """A way to keep activations, with its memory in bytes."""

    activations: Activations
    checkpoint_depth: int
    needed_bytes: int  # estimated peak of a step above weights and optimizer state
    budget_bytes: int  # available for it
    blocks: tuple[int, ...] = ()  # bytes of each block at that depth, in the order in which they run
    kept_blocks: int = 1  # of these, the last ones, which are not recomputed

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.budget_bytes

    def applied(self, way: Way) -> Way:
        return replace(
            way, activations=self.activations, checkpoint_depth=self.checkpoint_depth, kept_blocks=self.kept_blocks
        )

    @property
    def extra_time(self) -> float:
        """About what it adds to a step without recomputation, as a share of that."""
        if not self.checkpoint_depth:
            return _EXTRA_TIME[self.activations]
        kept = self.kept_blocks / len(self.blocks) if self.kept_blocks > 1 else 0.0
        return _ALL_RECOMPUTED * (1 - kept)

    def within(self, free_bytes: int, *, fills: bool) -> MemoryPlan:
        """The plan with another budget; if it `fills` that, no more blocks are recomputed than it needs."""
        budget = int(_SHARE * free_bytes)
        return self.filling(budget) if fills else replace(self, budget_bytes=budget)

    def filling(self, budget_bytes: int) -> MemoryPlan:
        bare = self.needed_bytes - _largest(self.blocks, self.kept_blocks)
        fitting = [kept for kept in range(1, len(self.blocks)) if bare + _largest(self.blocks, kept) <= budget_bytes]
        kept = max(fitting, default=1)
        needed = bare + _largest(self.blocks, kept)
        return replace(self, needed_bytes=needed, budget_bytes=budget_bytes, kept_blocks=kept)

    def __str__(self) -> str:
        ways = {
            "keep": "all are kept",
            "lean": "norms and activation functions are recomputed in the backward pass",
            "selective": "norms, activation functions and the wide layers of feed-forward networks are recomputed",
        }
        way = ways[self.activations]
        if self.checkpoint_depth:
            way = f"{recomputed_blocks(self.kept_blocks)} are recomputed, at depth {self.checkpoint_depth}"
        text = (
            f"Activations: {way}; a step needs about {memory_text(self.needed_bytes)} of "
            f"{memory_text(self.budget_bytes)}."
        )
        return text if self.fits else f"{text} Memory may run out; use a smaller batch or picture."


def chosen_plan(
    model: Trainable, samples: Sequence[Sample], config: ResolvedConfig, way: Way, budget_bytes: int
) -> MemoryPlan:
    """The cheapest plan that fits, otherwise the one that needs least memory; arguments as for `measured_plans`."""
    plans = []
    for plan in measured_plans(model, samples, config, way, budget_bytes):
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.needed_bytes)


def measured_plans(
    model: Trainable,
    samples: Sequence[Sample],
    config: ResolvedConfig,
    way: Way,
    budget_bytes: int,
    *,
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[MemoryPlan]:
    """All plans, cheapest first; each is measured on the largest sample when the iterator reaches it.

    `model` is frozen with only the adapters attached. `budget_bytes` is for a step, above what is allocated now.
    Forward passes run inside of `within()`, such as a mode of fake tensors.
    """
    run = largest_pass(model, samples, config, way, within=within)
    fills = not way.offloading or way.offloading_share is not None
    return _plans(model.module, run, int(_SHARE * budget_bytes), fills=fills)


def largest_pass(
    model: Trainable,
    samples: Sequence[Sample],
    config: ResolvedConfig,
    way: Way,
    *,
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Callable[[], Tensor]:
    """A function that runs the forward pass of a step on the largest sample."""
    sized = (siz for sample in samples for siz in sample.sizes())
    largest = max(sized, key=lambda one: one.size)
    # Each process has its share of a step's samples, in batches of at most the batch size.
    share = -(-config.samples_per_step // way.processes.size)
    # A step with methods needs the memory of one pass, and samples of an estimate have no texts or opposites for them.
    plain = {name: one.default for name, one in options_of(MethodSettings).items() if one.group == "Methods"}
    one_batch = replace(config, batch_size=min(config.batch_size, share), grad_accumulation_steps=1, **plain)
    maker = batch_maker(model, [replace(largest, opposite=None)], one_batch, replace(way, processes=ALONE))
    [batch] = maker.step(0)
    noised = batch.noised.to(way.dtype)
    values = KeptValues() if changes_in_place(model, way) else None

    def run() -> Tensor:
        routed = tokens_routed(model.module, model.routing, batch.route, batch.conditioning)
        with within(), changes_watched(values), routed:
            return model.predict(noised, batch.level.time, batch.conditioning)

    return run


def plan_for(engine: Engine, samples: Sequence[Sample]) -> MemoryPlan:
    """The plan of a prepared engine for the free memory of its device; see `chosen_plan`."""
    return chosen_plan(engine.model, samples, engine.config, engine.way, free_bytes(engine))


def fitting_plans(engine: Engine, samples: Sequence[Sample]) -> list[MemoryPlan]:
    """All plans of a prepared engine that fit into the free memory of its device, cheapest first."""
    memory_plans = measured_plans(engine.model, samples, engine.config, engine.way, free_bytes(engine))
    return [plan for plan in memory_plans if plan.fits]


def free_bytes(engine: Engine) -> int:
    """Memory for a step: the least of all processes, which plan alike."""
    way = engine.way
    optimizer = optimizer_bytes(engine.flat.master.nbytes)  # its state is allocated in the first step
    # One plan for all processes, as sharded weights are gathered in the same order by all.
    limits = [limit for limit in (way.memory_budget, way.memory_cap) if limit is not None]
    free = min(way.processes.gathered(free_memory(way.device, min(limits, default=None))))
    bare = int(way.memory_share * free) - optimizer
    # The pool of CUDA graphs keeps the memory of a whole pass, and the first pass of another shape is made outside it.
    return bare // 2 if way.cuda_graphs else bare


def optimizer_bytes(master_bytes: int) -> int:
    """Bytes of the optimizer's state for a master buffer of that size: at most the two moments of AdamW."""
    return 2 * master_bytes


def _plans(
    module: nn.Module, run: Callable[[], Tensor], budget_bytes: int, *, fills: bool = True
) -> Iterator[MemoryPlan]:
    probe = _Probe(module)
    with probe.blocks_tracked(), activations_reduced(module, "keep"), probe.saved_counted():
        run()
    transient = _TRANSIENT * probe.largest

    def reduced(kind: Activations) -> MemoryPlan:
        smaller = _Probe(module)
        with activations_reduced(module, kind), recipes_recorded() as recipes, smaller.saved_counted(recipes.pack):
            run()
        return MemoryPlan(kind, 0, smaller.total + transient, budget_bytes)

    keep = MemoryPlan("keep", 0, probe.total + transient, budget_bytes)
    depth = min(range(1, _DEPTHS + 1), key=probe.checkpointed)
    whole = MemoryPlan("keep", depth, probe.checkpointed(depth) + transient, budget_bytes, probe.blocks(depth))
    part = whole.filling(budget_bytes) if fills and not keep.fits else whole
    others: list[Activations] = ["lean", "selective"]
    for plan in (keep, part, whole) if part.kept_blocks > 1 else (keep, whole):
        while others and _EXTRA_TIME[others[0]] < plan.extra_time:
            yield reduced(others.pop(0))
        yield plan


def _largest(blocks: Sequence[int], kept: int) -> int:
    """Most bytes inside of blocks at a time: of the last `kept` together, or of one that is recomputed."""
    return max([sum(blocks[-kept:]), *blocks[:-kept]])


_Memory = tuple[StorageWeakRef, int]
"""A storage and its version."""


class _Probe:
    """Sizes of a forward pass's saved tensors, by storage and block."""

    def __init__(self, module: nn.Module) -> None:
        # A weak reference keeps the address from being reused, without keeping the memory.
        self._sizes: dict[_Memory, int] = {}
        self._kept: set[_Memory] = set()
        self._module = module
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
        self._running = [-1] * _DEPTHS
        self._inside: list[dict[int, set[_Memory]]] = [defaultdict(set) for _ in range(_DEPTHS)]

    @property
    def total(self) -> int:
        return self._bytes(self._kept)

    @property
    def largest(self) -> int:
        return max((self._sizes[one] for one in self._kept), default=0)

    def checkpointed(self, depth: int) -> int:
        """Peak bytes with blocks at a depth recomputed but the last."""
        outside = self._bytes(self._inside[depth - 1][-1])
        return int((1 + KEPT_SHARE) * outside) + _largest(self.blocks(depth), 1)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Bytes of each block at a depth, in the order in which they run."""
        inside = self._inside[depth - 1]
        return tuple(self._bytes(kept - inside[-1]) for block, kept in inside.items() if block >= 0)

    @contextlib.contextmanager
    def saved_counted(self, pack: Callable[[Tensor], Kept | Recipe] = Kept) -> Iterator[None]:
        """Inside the context, tensors saved by a forward pass are counted and freed; no backward pass may follow."""

        def count(tensor: Tensor) -> None:
            for one in held_by(pack(tensor)):
                if (key := self._note(one)) is not None:
                    self._kept.add(key)

        with torch.autograd.graph.saved_tensors_hooks(count, _no_backward):
            yield

    @contextlib.contextmanager
    def blocks_tracked(self) -> Iterator[None]:
        """Inside the context, saved tensors are attributed to blocks, whose inputs count as outside of them."""
        with contextlib.ExitStack() as undo:
            for level in range(_DEPTHS):
                for number, block in enumerate(blocks_at_depth(self._module, level + 1)):
                    undo.callback(restore_forward, block, block.__dict__.get("forward"))
                    block.forward = functools.partial(self._run, level, number, block.forward)
            yield

    def _run(self, level: int, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self._running[level] = number
        self._inside[level][number]  # is there from now on
        try:
            return forward(*args, **kwargs)
        finally:
            self._running[level] = -1

    def _note(self, tensor: Tensor) -> _Memory | None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights or isinstance(tensor, nn.Parameter):
            return None
        key = StorageWeakRef(storage), tensor._version  # what is kept of memory that changes is copied
        self._sizes[key] = storage.nbytes()
        for level, number in enumerate(self._running):
            self._inside[level][number].add(key)
        return key

    def _bytes(self, memory: set[_Memory]) -> int:
        return sum(self._sizes[one] for one in memory)


def _no_backward(packed: None) -> Tensor:
    raise AssertionError("a probe runs forwards only")
