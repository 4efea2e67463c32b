"""Frozen weights sharded over the processes of a run, by FSDP2 (Zhao et al. 2023, arXiv:2304.11277).

Each process keeps 1/N of the weights of every outermost block. A block is gathered before its forward pass and again
before its backward pass, one block ahead if the device allows it, and freed after either.

FSDP2 changes a module permanently and requires contiguous parameters, so it never receives a module of the model. A
block is replaced in its parent by a copy that shares its submodules. The packed weights of its layers (plain ones
included) are the bytes of one parameter of that copy, and each layer has a `WeightSource` of views of them. Other
parameters, and everything outside of blocks, are replicated.

Gathering is a collective operation, so every process makes the same passes (`batches`, `validation`). If one fails in
the middle of a pass, the others cannot continue: `ending_together` ends the run in all of them.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import packable_layers, weight_source_set
from lorasmith.adapters.frozen_weights import packed_weight
from lorasmith.adapters.inject import restore_forward
from lorasmith.core.allocator import is_out_of_memory, memory_missed
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.byte_layout import ByteLayout, ByteRange
from lorasmith.core.choices import Quantization
from lorasmith.core.errors import LorasmithError, TrainingError
from lorasmith.core.pinned_memory import DeviceCopies
from lorasmith.core.placement import memory_format_for
from lorasmith.core.printable import first_line
from lorasmith.core.processes import Processes
from lorasmith.core.quantization import AlwaysHere, CodeFormat, Packed, WeightSource

_ASKED_S = 1.0
"""Seconds between two checks for errors of other processes."""


@contextlib.contextmanager
def weights_sharded(
    module: nn.Module, *, kind: Quantization, device: torch.device, dtype: torch.dtype, processes: Processes
) -> Iterator[list[nn.Module]]:
    """Inside the context, this process holds a shard of the weights in blocks, with at least two processes.

    Yields the layers concerned, which `weights_packed` and `placed` must skip.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.size,))
    layout = memory_format_for(module)
    packable = set(packable_layers(module))
    sharded: list[nn.Module] = []
    copies: list[nn.Module] = []
    with contextlib.ExitStack() as undo:
        to_device = undo.enter_context(contextlib.closing(DeviceCopies(device)))
        undo.enter_context(warnings.catch_warnings())
        # About in-place sums into a block's output, which no denoiser has; tests compare each family with and without.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for block in blocks_at_depth(module, 1):
            layers = [layer for layer in block.modules() if layer in packable and layer not in sharded]
            if not layers:
                continue
            bytes_of = _Bytes()
            sources = [bytes_of.add(packed_weight(layer, kind, to_device, dtype, layout)) for layer in layers]
            bytes_of.join(to_device)
            copied = _copied(block)
            whole = copied._parameters, copied._buffers, copied._modules
            # FSDP2 sees only the bytes, and the model never does.
            copied._parameters, copied._buffers, copied._modules = {}, {}, {"bytes": bytes_of}
            fully_shard(copied, mesh=mesh)
            copied._parameters, copied._buffers, copied._modules = whole
            undo.enter_context(_replaced(module, block, copied))
            for layer, source in zip(layers, sources, strict=True):
                undo.enter_context(weight_source_set(layer, source, device=device, dtype=dtype))
            sharded += layers
            copies.append(copied)
        to_device.close()
        root = _Root()
        fully_shard(root, mesh=mesh)
        undo.enter_context(_run_by(module, root, copies))
        undo.enter_context(_aborted_with_others(processes, device))
        yield sharded


@contextlib.contextmanager
def ending_together(processes: Processes, *, agreed: type[Exception]) -> Iterator[None]:
    """Inside the context, an error in one process ends the run in all, each with one sentence.

    Errors of the type `agreed` are raised by all processes together and pass through. Raises TrainingError if memory
    ran out, blocks cannot be compiled, or another process has ended.
    """
    try:
        yield
    except agreed:
        raise
    except BaseException as error:
        explained = _explained(error, processes)
        if not processes.reported:
            processes.report(first_line(explained))
        if explained is error:
            raise
        raise explained from error


class _Bytes(nn.Module):
    """The packed weights of a block, as the bytes of one parameter."""

    # (bytes / 4,), called fp32, as FSDP2 of torch before 2.10 takes no integers; between passes it has this process's
    # shard in its place.
    whole: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._layout = ByteLayout()
        self._taken: list[tuple[Tensor, ByteRange]] = []

    def add(self, weight: Packed) -> ShardedWeight:
        places = [self._layout.add(tensor) for tensor in weight.tensors]
        self._taken += zip(weight.tensors, places, strict=True)
        return ShardedWeight(self, places, weight)

    def join(self, copies: DeviceCopies) -> None:
        whole = torch.zeros(self._layout.size_bytes, dtype=torch.uint8, device=copies.device)
        for tensor, place in self._taken:
            copies.copy(tensor, place.view(whole))
        self.whole = nn.Parameter(whole.view(torch.float32), requires_grad=False)
        self._taken.clear()


class ShardedWeight(WeightSource):
    """A layer's weight source in the bytes of its block, available during the block's passes."""

    def __init__(self, block: _Bytes, places: Sequence[ByteRange], weight: Packed) -> None:
        self._format = weight.format
        self._block = block
        self._places = tuple(places)
        self._unpack = weight.unpack
        self._dtype = weight.dtype
        self._shape = weight.shape

    @property
    def format(self) -> CodeFormat | None:
        return self._format

    def use(self) -> contextlib.AbstractContextManager[Packed]:
        whole = self._block.whole
        tensors = tuple([place.view(whole) for place in self._places])
        return AlwaysHere(Packed(tensors, self._unpack, self._dtype, self._shape))


class _Root(nn.Module):
    """Root of the sharded blocks, so that they share streams and their order is known."""

    def forward(self, run: Callable[[], None]) -> None:
        """Call the denoiser's own forward, whose output FSDP2 need not see."""
        run()


def _copied(block: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters, buffers and submodules, in tables of its own."""
    copied = copy.copy(block)
    for name, value in vars(nn.Module()).items():
        if isinstance(value, dict | set):
            copied.__dict__[name] = copy.copy(copied.__dict__[name])
    return copied


@contextlib.contextmanager
def _replaced(model: nn.Module, block: nn.Module, by: nn.Module) -> Iterator[None]:
    """Inside the context, `by` replaces `block` everywhere in the model."""
    places = [
        (parent._modules, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is block
    ]
    for children, name in places:
        children[name] = by
    try:
        yield
    finally:
        for children, name in places:
            children[name] = block


@contextlib.contextmanager
def _run_by(module: nn.Module, root: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the context, the forward of `module` runs inside that of `root`, which gets the blocks as children."""
    root.add_module("blocks", nn.ModuleList(blocks))
    own, forward = module.__dict__.get("forward"), module.forward

    def within(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        root(lambda: found.append(forward(*args, **kwargs)))
        return found[0]

    module.forward = within
    try:
        yield
    finally:
        restore_forward(module, own)


def _explained(error: BaseException, processes: Processes) -> BaseException:
    """An error in one process of a sharded run as a sentence for the user, or the error itself."""
    if isinstance(error, LorasmithError) or not isinstance(error, Exception):
        return error
    if is_out_of_memory(error):
        return TrainingError(
            f"memory must hold a step in each process of a sharded run, but ran out in process {processes.rank} "
            f"({memory_missed(error)}); use a smaller batch_size, gradient_checkpointing, quantization, or more "
            "processes"
        )
    from torch import distributed

    is_lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
    if isinstance(error, RuntimeError) and (is_lost or processes.reported):
        return processes.lost(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return TrainingError(
            f"blocks must be compiled in each process, but cannot ({first_line(error)}); leave compile out"
        )
    return error


@contextlib.contextmanager
def _aborted_with_others(processes: Processes, device: torch.device) -> Iterator[None]:
    """Inside the context, collectives are aborted once another process has reported an error.

    Over TCP they fail when the other's connection closes; on a GPU they would wait forever.
    """
    if device.type != "cuda":
        yield
        return
    from torch.distributed import distributed_c10d

    done = threading.Event()

    def watch() -> None:
        while not done.wait(_ASKED_S):
            if processes.reported:
                distributed_c10d._abort_process_group()
                return

    watcher = threading.Thread(target=watch, name="lorasmith-others", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
