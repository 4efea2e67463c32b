"""The gradient of a step over several processes: summed in buckets while the backward pass still runs.

    bytes per step and process    4 · parameters · 2 (N − 1) / N, and 4 (samples of the step + 1)

The flat buffer is cut into buckets at parameters' borders. In the last backward pass, a bucket's reduction starts once
all its gradients are there, from the end of the buffer to its start, about the order of a backward pass (Li et al.
2020, arXiv:2006.15704). Every process reduces the same buckets in the same order; one that ran out of memory sends what
it has and reports the failure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lorasmith.core.processes import Processes
from lorasmith.training.optim.flat import FlatParameters

BUCKET_NUMBERS = 4 * 1024**2
"""Least numbers of a bucket: 16 MiB, enough for the speed of a link and little enough to overlap."""


class GradientSums:
    """Sums the gradient of `flat` over at least two processes."""

    def __init__(self, flat: FlatParameters, processes: Processes, bucket_numbers: int = BUCKET_NUMBERS) -> None:
        self._flat = flat
        self._processes = processes
        self._buckets, self._bucket_of = flat.buckets(bucket_numbers)
        self._waiting: list[Callable[[], object]] = []
        self._next = len(self._buckets) - 1
        self._left: list[int] = []
        self._wants_norm = False
        self._squares: list[Tensor] = []

    @contextlib.contextmanager
    def during_backward(self, *, norm: bool) -> Iterator[None]:
        """Inside the context, the last backward pass of a step, buckets are reduced once their gradients are there."""
        self._wants_norm, self._squares = norm, []
        self._left = [0] * len(self._buckets)
        for bucket in self._bucket_of.values():
            self._left[bucket] += 1
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._arrived, self._bucket_of[name])
            )
            for name, parameter in self._flat.parameters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        while self._next >= 0:
            self._begin()
        for wait in self._waiting:
            wait()
        self._waiting, self._next = [], len(self._buckets) - 1

    @property
    def own_norm(self) -> Tensor:
        """Norm of this process's own gradient before the sums, if `during_backward` had `norm` set."""
        return torch.stack(self._squares).sum().sqrt()

    def _arrived(self, bucket: int, _: Tensor) -> None:
        self._left[bucket] -= 1
        while self._next >= 0 and self._left[self._next] <= 0:
            self._begin()

    def _begin(self) -> None:
        part = self._flat.collect(*self._buckets[self._next])
        if self._wants_norm:
            self._squares.append(part.square().sum())
        self._waiting.append(self._processes.summing(part))
        self._next -= 1
