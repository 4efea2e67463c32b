"""CUDA graphs without CUDA: the operations of a capture are recorded with their tensors, and repeated by a replay.

As on a GPU, a replay runs no Python of the captured code: what that read on the host is what it was then, and tensors
are the memory of then. Nothing is computed during a capture as far as anyone can see. Between two replays, the memory
that graphs allocated has no values, as other graphs of a pool use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda.streams import Streams

_OVERWRITTEN = 0xFF  # not a number, as bytes of floats


@dataclass(eq=False)
class Tape:
    """`torch.cuda.CUDAGraph`.

    Attributes:
        operations: functions with arguments and results, in order.
        made: the memory that they allocated, as bytes.
        replays: how often it was replayed.
    """

    operations: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.forget()
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
                for own, new in zip(_tensors(result), _tensors(again), strict=True):
                    if own.untyped_storage()._cdata not in given:
                        own.copy_(new)

    def forget(self) -> None:
        """Overwrite all memory of the graph."""
        for one in self.made.values():
            one.fill_(_OVERWRITTEN)


class _Recording(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of what is written to, and a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, made = kwargs or {}, self._tape.made
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in _tensors(value):
                    storage = one.untyped_storage()
                    if storage._cdata not in made and storage._cdata not in self.before:
                        self.before[storage._cdata] = (whole := _bytes(one)), whole.clone()
        result = func(*args, **kwargs)
        given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        for one in _tensors(result):
            if (key := one.untyped_storage()._cdata) not in given:
                made[key] = _bytes(one)
        self._tape.operations.append((func, args, kwargs, result))
        return result


@contextlib.contextmanager
def recorded(tape: Tape, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    with _Recording(tape) as recording:
        yield
    for own, before in recording.before.values():
        own.copy_(before)
    tape.forget()


@contextlib.contextmanager
def graphs_on_tape() -> Iterator[list[Tape]]:
    """Inside the context, CUDA graphs are tapes, on any device; yields those that are captured."""
    tapes = list[Tape]()

    def made() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    with (
        Streams().in_place(),
        mock.patch.object(torch.cuda, "graph_pool_handle", tuple),
        mock.patch.object(torch.cuda, "CUDAGraph", made),
        mock.patch.object(torch.cuda, "graph", recorded),
    ):
        yield tapes


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _bytes(tensor: Tensor) -> Tensor:
    """The whole memory of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
