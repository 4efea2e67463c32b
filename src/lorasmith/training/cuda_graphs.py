"""CUDA graphs: a batch's forward and backward pass, captured once for each shape and replayed for later batches.

The host starts some ten thousand kernels in a step, one by one, which limits steps of small pictures. A CUDA graph
starts all of a pass with one call. It repeats kernels at the addresses and with the numbers of their capture and runs
no Python, so that batches are copied to where the captured pass read its own, and gradients are added where it added
them. Everything else of a step (clipping, optimizer, averages) stays as it is.

    first batch of a shape     as without graphs, which fills caches of the model and makes kernels choose algorithms
    second                     the same, watched for what no graph repeats; the pass is then captured with the first
                               batch, replayed with the second, and compared, so that no value of a batch is in it
    later ones                 replayed

All graphs have one pool of memory, as only one is replayed at a time and its results are copied. They hold for as long
as adapters are attached.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasmith.core.allocator import has_lost_device, is_out_of_memory
from lorasmith.core.errors import TrainingError
from lorasmith.core.placement import side_stream
from lorasmith.core.printable import first_line
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.batches import Batch

_MOST = 32
"""Shapes of a run that get a graph; each takes some MiB of the device, and batches of others are computed without."""

_TOLERANCE = 0.02
"""Difference of two gradients relative to their norm, where kernels are not deterministic."""

Pass = Callable[[Batch], Tensor]
"""Adds the gradient of a batch to the flat buffer, and returns its losses (batch,)."""


class NotReplayable(Exception):  # noqa: N818 - the step is repeated without graphs
    """No graph repeats a pass, for a reason that the text says as a clause; nothing was captured by halves."""


class CudaGraphs:
    """The captured passes of a prepared model; `gradient` is the flat buffer that they add to."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient
        self._stream = side_stream(gradient.device, "graphs")
        self._pool = torch.cuda.graph_pool_handle()
        self._known: dict[object, Batch | _Captured] = {}  # by shape: the first batch, then the graph

    def run(self, batch: Batch, run: Pass) -> Tensor:
        """The result of `run`, by a graph if there is one for the batch's shape.

        Raises NotReplayable, or TrainingError if CUDA refuses what was captured.
        """
        key = tuple(map(_described, _parts(batch)))
        known = self._known.get(key)
        if isinstance(known, _Captured):
            return known.replayed(batch)
        if known is None:
            if len(self._known) < _MOST:
                self._known[key] = deepcopy(batch, {id(batch.settings): batch.settings})
            return run(batch)
        before = self._gradient.clone()
        reads = _Reads(_tensors(batch))
        losses = self._warm(batch, run, reads)
        if reads.refusal:
            raise NotReplayable(reads.refusal)
        expected = self._gradient.clone()
        if not (change := float(torch.linalg.vector_norm(expected - before))) or not math.isfinite(change):
            return losses  # nothing to compare with
        self._gradient.copy_(before)
        captured = self._captured(known, run, reads)
        captured.replayed(batch)
        error = float(torch.linalg.vector_norm(self._gradient - expected)) / change
        if not error <= (0 if torch.are_deterministic_algorithms_enabled() else _TOLERANCE):
            raise NotReplayable(f"has another gradient when it is replayed, by {error:.2g} of its norm")
        self._gradient.copy_(expected)
        self._known[key] = captured
        return losses

    def _warm(self, batch: Batch, run: Pass, reads: _Reads) -> Tensor:
        """The pass on the stream of captures, so that libraries have their memory for it."""
        gc.collect()  # nodes of earlier backward passes, which would take their stream into the capture
        here = torch.cuda.current_stream(self._gradient.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), reads:
            losses = run(batch)
        here.wait_stream(self._stream)
        losses.record_stream(here)
        return losses

    def _captured(self, inputs: Batch, run: Pass, reads: _Reads) -> _Captured:
        """The graph of the pass, which is not run."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread makes the next batch, whose copies and allocations are not part of the pass.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                losses = run(inputs)
        except RuntimeError as error:
            if is_out_of_memory(error) or has_lost_device(error):
                raise
            # Torch's allocator stays in the middle of a capture that CUDA refused, and frees nothing any more.
            raise TrainingError(
                f"cuda_graphs needs a step that CUDA can capture, but this one fails ({first_line(error)}); leave it "
                "out, turn autotune off, and run the same command again, which continues this run"
            ) from error
        return _Captured(graph, inputs, losses, reads)


class _Captured:
    """A graph with the memory of its inputs and of its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Batch, losses: Tensor, reads: _Reads) -> None:
        self._graph, self._losses, self._reads = graph, losses, reads
        self._inputs = _tensors(inputs)

    def replayed(self, batch: Batch) -> Tensor:
        for own, given in zip(self._inputs, _tensors(batch), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._losses.clone()  # which the next replay overwrites


class _Reads(TorchDispatchMode):
    """Inside the context, a pass is watched; `inputs` are the tensors of its batch.

    Tensors that it reads and that were there before are kept alive with this object: a graph has their addresses alone,
    and a model may drop its table for one size when it makes that for another.

    Attributes:
        refusal: what the pass does that no graph repeats; empty for nothing.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal = ""
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._others = {storage._cdata for storage in _storages(inputs)}  # and what the pass makes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._others:
                self._kept[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        self.refusal = self.refusal or _refusal(func, args, kwargs, result)
        self._others |= {storage._cdata for storage in _storages(result)} - self._kept.keys()
        return result


_aten = torch.ops.aten

_BY_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

_BY_INDEX = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Operations that wait for the values of an index if that is a mask."""


def _refusal(func: Any, args: Any, kwargs: Any, result: Any) -> str:
    """What an operation does that no graph repeats, as a clause; empty for nothing."""
    name = func._opname
    tensors = [leave for leave in tree_leaves((args, kwargs, result)) if isinstance(leave, Tensor)]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return ""
    # Single numbers of the host are part of a kernel's call, except where they are copied.
    devices = {tensor.device.type for tensor in tensors if tensor.ndim or name in ("_to_copy", "copy_")}
    if len(devices) > 1 or name == "lift_fresh":  # as `torch.tensor(numbers, device=...)` ends
        return f"copies between the host and the GPU ({name})"  # a graph would read memory that is freed
    if name in _BY_INDEX:
        waits = any(arg is not None and arg.dtype in (torch.bool, torch.uint8) for arg in args[1])
    else:
        waits = not _BY_VALUES.isdisjoint(func.tags)
    return f"reads a value of the GPU on the host ({name})" if waits else ""


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leave.untyped_storage() for leave in tree_leaves(tree) if isinstance(leave, Tensor))


_OF_DRAWS = frozenset({"names", "draws", "indices", "quantiles", "settings"})
"""Fields of a batch that its pass does not read, or that are the same in all."""


def _parts(value: object) -> Iterator[object]:
    """Everything that a pass reads: tensors of the device, and values of the host."""
    if isinstance(value, Conditioning):
        mask = value.mask_on_cpu
        yield None if mask is None else mask.numpy().tobytes()
        yield from _parts(value.tensors)
        yield value.mask
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield name
            yield from _parts(one)
    elif is_dataclass(value):
        for field in fields(value):
            if field.name not in _OF_DRAWS:
                yield from _parts(getattr(value, field.name))
    else:
        yield value


def _tensors(batch: Batch) -> list[Tensor]:
    return [part for part in _parts(batch) if isinstance(part, Tensor)]


def _described(part: object) -> object:
    return (part.shape, part.stride(), part.dtype) if isinstance(part, Tensor) else part
