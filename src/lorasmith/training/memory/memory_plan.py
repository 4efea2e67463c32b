"""Which activations are kept, chosen by measurement: the cheapest plan whose memory fits the budget.

A probe runs the forward pass of a step on the largest picture, once for each way of keeping activations, and lets go of
whatever the backward pass would need as soon as its size is noted, so that it fits where training would not. Block by
block sizes of the first run say what gradient checkpointing would leave at each depth. The plans, cheapest first:

    keep        no extra work
    lean        cheap results are made again                                     see `activations`
    selective   so are the outputs of widening layers                            see `activations`
    depth d     blocks are computed again, at the depth that needs the least     see `checkpointing`
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lorasmith.adapters.inject import restore_forward
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.choices import Activations
from lorasmith.data.dataset import Sample
from lorasmith.families.model import Denoiser
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.events import Planned, Warned
from lorasmith.training.memory.activation_checkpointing import blocks_at_depth
from lorasmith.training.memory.activations import Remade, held_by, noted, sparing
from lorasmith.training.runtime import Runtime

__all__ = ["MemoryPlan", "chosen_plan", "free_memory", "plan_activations", "plan_for"]

_DEPTHS = 5
_SHARE = 0.9  # of what is free; fragments and other programs have the rest
_TRANSIENT = 6  # largest kept tensor times this: what a product and its gradients need for a moment


@dataclass(frozen=True)
class MemoryPlan:
    """A way to keep activations.

    Attributes:
        activations, checkpoint_depth: as in `Runtime`.
        needed_bytes: estimated peak of a step above weights and optimizer state.
        budget_bytes: what it had to fit.
    """

    activations: Activations
    checkpoint_depth: int
    needed_bytes: int
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it is expected to."""
        return self.needed_bytes <= self.budget_bytes

    def __str__(self) -> str:
        ways = {
            "keep": "all are kept",
            "lean": "norms and activation functions are computed again in the backward pass",
            "selective": "norms, activation functions and the wide layers of feed-forward networks are computed again",
        }
        way = f"blocks are computed again, at depth {self.checkpoint_depth}" if self.checkpoint_depth else ""
        text = (
            f"Activations: {way or ways[self.activations]}; about {_size(self.needed_bytes)} of "
            f"{_size(self.budget_bytes)} for a step."
        )
        return text if self.fits else f"{text} That may not be enough: a smaller batch or picture needs less."


def chosen_plan(
    denoiser: Denoiser, samples: Sequence[Sample], config: ResolvedConfig, runtime: Runtime, budget_bytes: int
) -> MemoryPlan:
    """The cheapest plan that fits, or the one that needs the least.

    Args:
        denoiser: frozen, with the adapters attached and nothing else.
        samples: of the run; the largest is looked at.
        config, runtime: of the run.
        budget_bytes: what a step may take above what is there now.
    """
    largest = max(samples, key=lambda sample: sample.latents.numel())
    one_batch = replace(config, grad_accumulation_steps=1)
    batch = batch_maker(denoiser, [largest], one_batch, runtime).step(0)[0]
    noised = batch.noised.to(runtime.dtype)
    plans = []
    for plan in _plans(
        denoiser.module,
        functools.partial(denoiser.predict, noised, batch.level.time, batch.conditioning),
        int(_SHARE * budget_bytes),
    ):
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.needed_bytes)


def plan_activations(engine: Engine, samples: Sequence[Sample]) -> Planned | Warned:
    """Decide how an engine keeps activations, which has to be prepared; returns what to tell."""
    try:
        plan = plan_for(engine, samples)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        engine.change(activations="keep", checkpoint_depth=1)  # the step itself finds out about smaller pieces
        return Warned(message="Memory ran out while activations were measured: blocks are computed again.")
    engine.change(activations=plan.activations, checkpoint_depth=plan.checkpoint_depth)
    return Planned(**asdict(plan), message=str(plan))


def plan_for(engine: Engine, samples: Sequence[Sample]) -> MemoryPlan:
    """What a run decides before its first step, with what its device has free for one; see `chosen_plan`."""
    runtime = engine.runtime
    optimizer = 2 * engine.flat.master.nbytes  # its state comes with the first step
    free = free_memory(runtime.device, runtime.memory_budget) - optimizer
    return chosen_plan(engine.denoiser, samples, engine.config, runtime, free)


def free_memory(device: torch.device, limit_bytes: int | None = None) -> int:
    """Bytes that may still be taken on a device.

    Args:
        device: a CUDA device or the CPU.
        limit_bytes: of what this process may take in all; None for no limit but the device's own.
    """
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
    else:
        taken = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
    return int(free if limit_bytes is None else min(free, limit_bytes - taken))


def _plans(module: nn.Module, run: Callable[[], Tensor], budget_bytes: int) -> Iterator[MemoryPlan]:
    """Plans with what they need, cheapest first; each is measured when it is asked for."""
    probe = _Probe(module)
    with probe.by_block(), sparing(module, "keep"), probe.counting():
        run()
    transient = _TRANSIENT * probe.largest
    yield MemoryPlan("keep", 0, probe.total + transient, budget_bytes)
    kinds: tuple[Activations, ...] = ("lean", "selective")
    for kind in kinds:
        smaller = _Probe(module)
        with sparing(module, kind), noted() as notes, smaller.counting(notes.pack):
            run()
        yield MemoryPlan(kind, 0, smaller.total + transient, budget_bytes)
    needed, depth = min((probe.checkpointed(depth), depth) for depth in range(1, _DEPTHS + 1))
    yield MemoryPlan("keep", depth, needed + transient, budget_bytes)


class _Probe:
    """Sizes of what a forward pass keeps, by memory, and in which blocks it is kept."""

    def __init__(self, module: nn.Module) -> None:
        # A weak reference keeps the address from being used for other memory, and nothing else.
        self._sizes: dict[StorageWeakRef, int] = {}
        self._kept: set[StorageWeakRef] = set()
        self._module = module
        self._weights = {one.untyped_storage()._cdata for one in (*module.parameters(), *module.buffers())}
        self._running = [-1] * _DEPTHS
        self._inside: list[dict[int, set[StorageWeakRef]]] = [defaultdict(set) for _ in range(_DEPTHS)]

    @property
    def total(self) -> int:
        """Bytes of all that is kept."""
        return self._bytes(self._kept)

    @property
    def largest(self) -> int:
        """Bytes of the largest piece."""
        return max((self._sizes[one] for one in self._kept), default=0)

    def checkpointed(self, depth: int) -> int:
        """Bytes that are kept if blocks at a depth are computed again, while the largest of them is."""
        inside = self._inside[depth - 1]
        outside = inside[-1]
        largest = max((self._bytes(kept - outside) for block, kept in inside.items() if block >= 0), default=0)
        return self._bytes(outside) + largest

    @contextlib.contextmanager
    def counting(self, pack: Callable[[Tensor], Tensor | Remade] = lambda tensor: tensor) -> Iterator[None]:
        """Count what a forward pass inside keeps, which is let go of at once: there can be no backward pass."""

        def count(tensor: Tensor) -> None:
            for one in held_by(pack(tensor)):
                if (key := self._note(one)) is not None:
                    self._kept.add(key)

        with torch.autograd.graph.saved_tensors_hooks(count, _no_backward):
            yield

    @contextlib.contextmanager
    def by_block(self) -> Iterator[None]:
        """Know the blocks of each depth while inside; what they are given counts as kept outside of them."""
        with contextlib.ExitStack() as undo:
            for level in range(_DEPTHS):
                for number, block in enumerate(blocks_at_depth(self._module, level + 1)):
                    undo.callback(restore_forward, block, block.__dict__.get("forward"))
                    block.forward = functools.partial(self._run, level, number, block.forward)
            yield

    def _run(self, level: int, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._note(one)
        self._running[level] = number
        try:
            return forward(*args, **kwargs)
        finally:
            self._running[level] = -1

    def _note(self, tensor: Tensor) -> StorageWeakRef | None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights or isinstance(tensor, nn.Parameter):
            return None
        key = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._sizes[key] = storage.nbytes()
        for level, number in enumerate(self._running):
            self._inside[level][number].add(key)
        return key

    def _bytes(self, memory: set[StorageWeakRef]) -> int:
        return sum(self._sizes[one] for one in memory)


def _no_backward(packed: None) -> Tensor:
    raise AssertionError("a probe runs forwards only")


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
