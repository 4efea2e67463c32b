"""Activation checkpointing of blocks (Chen et al. 2016, arXiv:1604.06174): they run again in the backward pass.

As torch's own without re-entry (`torch.utils.checkpoint`) and with the same numbers, but less is done again:

- Functions keep small results of the first run (`RecomputedCall.kept`), and leave out large ones that no saved tensor
  depends on (`RecomputedCall.is_unused`), such as the last product of a block.
- The last blocks of a pass run once: one, as its backward pass follows at once, or more (`Recomputing`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lorasmith.core.kept_values import Kept, active_values, changes_watched

KEPT_SHARE = 1 / 8
"""Most memory of what the functions of a block keep, as a share of its inputs'."""


def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a forward that runs again in the backward pass."""
    # Random numbers of adapters are keyed, so no generator state has to be restored for the second run.
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return _Block(forward, args, kwargs, {}).first_run(args, kwargs)


class Recomputing:
    """Recomputes the blocks of a network, but not the last ones of the pass before, as many as are `kept`."""

    def __init__(self, kept: int = 1) -> None:
        self._kept = kept
        self._pass: list[Any] = []  # forwards of this pass
        self._last: Sequence[Any] = ()  # of the pass before
        self._unused: dict[Any, dict[_Shape, frozenset[int]]] = {}

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the forward of a block."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return recomputed(forward, *args, **kwargs)
        if self._pass and forward is self._pass[0]:
            self._last, self._pass = self._pass[-self._kept :], []
        self._pass.append(forward)
        if forward in self._last:
            return forward(*args, **kwargs)
        return _Block(forward, args, kwargs, self._unused.setdefault(forward, {})).first_run(args, kwargs)


class RecomputedCall:
    """A call of a function within a block, the same in both runs.

    Attributes:
        kept: results of the first run; empty if they were too large, and in the first run.
        is_unused: whether this is the second run, and no saved tensor depends on what the function returns.
    """

    def __init__(self, block: _Block) -> None:
        self.kept: Sequence[Tensor] = ()
        self.is_unused = False
        self.node: object = None  # of a function of autograd, until the first run ends
        self._versions: list[int] = []
        self._block: _Block | None = block

    def ends(self, results: Sequence[Tensor], node: object = None) -> None:
        """Name what may be kept, and the `ctx` of a function of autograd that can leave its outputs unset."""
        if self._block is not None:
            self.kept, self.node = self._block.affordable(results), node
            self._versions = [tensor._version for tensor in self.kept]
            self._block = None

    def drop_modified(self) -> None:
        """Keep nothing that was modified in place since."""
        if self._versions != [tensor._version for tensor in self.kept]:
            self.kept = ()


def constant_kept(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward(x)`, in the second run that of the first if it is small and x needs no gradient."""
    call = None if x.requires_grad else current_call()
    if call is not None and call.kept:
        return call.kept[0]
    result = forward(x)
    if call is not None:
        call.ends([result])
    return result


def current_call() -> RecomputedCall | None:
    """The call of a function, to be asked for once in it; None outside of blocks and in compiled code."""
    block = None if torch.compiler.is_compiling() else _running.block
    return None if block is None else block.next_call()


_Shape = tuple[int, int]
"""Numbers of calls and of saved tensors, which distinguish runs of a block."""


class _Block:
    """A call of a block, which saves nothing until its second run."""

    def __init__(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        unused: dict[_Shape, frozenset[int]],
    ) -> None:
        arguments = [*args, *kwargs.values()]
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self._forward, self._names, self._unused = forward, [*kwargs], unused
        self._is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        self._others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        # As a function saves tensors, so that hooks around the block see them, such as those that offload.
        self._inputs: Any = _Inputs.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn
        self._budget = KEPT_SHARE * sum(tensor.nbytes for tensor in tensors)
        self._count = 0  # of tensors saved in the first run
        self._calls: list[RecomputedCall] = []
        self._again: Iterator[RecomputedCall] | None = None  # the calls of the second run
        self._saved: list[Tensor | Kept | None] = []  # in the second run, until they are used
        self._values = active_values()

    def first_run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with self._running(self._counted, self._taken):
            result = self._forward(*args, **kwargs)
        shape = len(self._calls), self._count
        if shape not in self._unused:
            self._unused[shape] = self._without_use(result)
        for number, call in enumerate(self._calls):
            call.node, call.is_unused = None, number in self._unused[shape]
        return result

    def next_call(self) -> RecomputedCall:
        if self._again is not None:
            return next(self._again)
        self._calls.append(RecomputedCall(self))
        return self._calls[-1]

    def affordable(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results, or none of them if they are too large."""
        size = sum(result.nbytes for result in results)
        if size > self._budget:
            return ()
        self._budget -= size
        return results

    def _without_use(self, result: Any) -> frozenset[int]:
        """The calls whose outputs reach the block's results through functions that save nothing of them."""
        began = self._inputs._sequence_nr()
        leaves = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        nodes: set[Node] = set()
        while leaves:
            node = leaves.pop()
            if node is not None and node not in nodes and node._sequence_nr() > began:
                nodes.add(node)
                leaves += [function for function, _ in node.next_functions]
        used: set[Node | None] = set()
        for node in sorted(nodes, key=methodcaller("_sequence_nr"), reverse=True):  # the last function first
            if node in used or not _is_linear(node):
                used.update(function for function, _ in node.next_functions)
        return frozenset(
            number for number, call in enumerate(self._calls) if call.node in nodes and call.node not in used
        )

    def _counted(self, tensor: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def _taken(self, number: int) -> Tensor:
        if not self._saved or self._saved[number] is None:
            self._second_run()
        saved, self._saved[number] = self._saved[number], None
        assert saved is not None
        return saved.value if isinstance(saved, Kept) else saved

    def _second_run(self) -> None:
        for call in self._calls:
            call.drop_modified()
        self._again, self._saved = iter(self._calls), []
        tensors = iter(self._inputs.saved_tensors)
        inputs = [
            next(tensors) if is_tensor else other
            for is_tensor, other in zip(self._is_tensor, self._others, strict=True)
        ]
        count = len(inputs) - len(self._names)
        args, kwargs = inputs[:count], dict(zip(self._names, inputs[count:], strict=True))
        running = self._running(self._found, _same)
        with contextlib.suppress(_CompleteError), torch.enable_grad(), running, changes_watched(self._values):
            self._forward(*args, **kwargs)
        assert len(self._saved) == self._count, "a block saves less in its second run"

    def _found(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach() if tensor.requires_grad else tensor  # without the second run's graph
        self._saved.append(tensor if self._values is None else self._values.keep(tensor))
        if len(self._saved) == self._count:
            raise _CompleteError
        return tensor

    @contextlib.contextmanager
    def _running(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Iterator[None]:
        before, _running.block = _running.block, self
        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            _running.block = before


class _Running(threading.local):
    """The block that runs in a thread; backward passes have threads of their own."""

    block: _Block | None = None


_running = _Running()


class _CompleteError(Exception):
    """Ends a second run."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Inputs(torch.autograd.Function):
    """Saves tensors, and has no backward pass."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return empty.new_empty(0)


def _is_linear(node: Node) -> bool:
    """Whether a node saves nothing of the tensors that it differentiates."""
    name = type(node).__name__.rstrip("0123456789")
    if name == "MulBackward":
        return sum(function is not None for function, _ in node.next_functions) == 1
    return name in _LINEAR


_LINEAR = {
    f"{name}Backward"
    for name in (
        *("Add", "Sub", "Neg", "ToCopy", "Clone", "Cat", "Stack"),
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "T", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Expand"),
        *("Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Narrow"),
    )
}
"""Functions of autograd that save sizes alone."""
