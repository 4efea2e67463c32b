"""One flat buffer for all trained parameters, and its gradient summed over several processes.

    master    fp32 (N,)          updated by the optimizer, and saved
    compute   dtype (N,)         read by the forward pass: the adapters' parameters are views of it
    grad      fp32 (N,)          gradients, summed over micro-batches, zeroed and never None

Parameters of one group are contiguous, so that an element-wise optimizer gets one tensor per group. They are separate
autograd leaves: slicing one big leaf would cost a full-size gradient per layer. In half precision gradients accumulate
in a second buffer of that dtype, which is added to `grad` after each micro-batch; in fp32 they do in `grad` itself, and
compute and master share memory. On a CPU autograd adds each gradient to its buffer. On a GPU, where each sum would be
a launch, it keeps small gradients as the backward pass made them, and `collect` adds all of them at once.

The master is fp32 because at learning rate 1e-4 most AdamW updates are below half a unit in the last place of bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.core.processes import Processes

_ALIGNMENT = 32  # elements: two cache lines of fp32, so that views start aligned in any dtype
_GROUP_ALIGNMENT = 256  # elements: a block of 8-bit optimizer state, which keeps incomplete blocks in fp32

_ADDED_BY_AUTOGRAD = ("cpu",)
"""Types of devices on which autograd adds all gradients to the buffer, one by one."""

_SMALL = 1 << 20
"""Elements up to which a gradient is kept until all are added: the launch costs more than the memory."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one learning rate, in the two forms that optimizers accept."""

    flat: Tensor  # part of the master buffer, (n,), with its gradient
    views: tuple[Tensor, ...]  # of the same memory, in the parameters' shapes, each with its gradient
    rate: float


def buffer_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Bytes of the buffers for that many parameters and products in `dtype`."""
    return numbers * (8 if dtype == torch.float32 else 8 + 2 * dtype.itemsize)


class FlatParameters:
    """fp32 parameters moved into flat buffers until `release`; those of one learning rate form a group."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        device: torch.device,
        dtype: torch.dtype,  # of the forward pass
        rates: Mapping[str, float] | None = None,  # by name, 0 if missing
    ) -> None:
        members: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            members.setdefault((rates or {}).get(name, 0.0), {})[name] = parameter
        self._parameters = {name: parameter for group in members.values() for name, parameter in group.items()}
        self._offsets: dict[str, int] = {}
        ends = []
        size = 0
        for group in members.values():
            for name, parameter in group.items():
                self._offsets[name] = size
                size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            size = -(-size // _GROUP_ALIGNMENT) * _GROUP_ALIGNMENT
            ends.append(size)
        self.master = torch.zeros(size, device=device)
        self.grad = torch.zeros(size, device=device)
        half = dtype != torch.float32
        self._compute = torch.zeros(size, device=device, dtype=dtype) if half else self.master
        self._compute_grad = torch.zeros_like(self._compute) if half else self.grad
        self.groups: list[ParameterGroup] = []
        for start, end, (rate, group) in zip([0, *ends], ends, members.items(), strict=False):
            part = self.master[start:end]
            part.grad = self.grad[start:end]
            self.groups.append(ParameterGroup(part, tuple(map(self._leaf, group)), rate))
        self._added_at_once: dict[str, Tensor] = {}  # the place of a gradient in the buffer
        for name, parameter in self._parameters.items():
            self.view(self.master, name).copy_(parameter.data)
            parameter.data = self.view(self._compute, name)
            parameter.grad = self.view(self._compute_grad, name)
            if device.type not in _ADDED_BY_AUTOGRAD and parameter.numel() <= _SMALL:
                self._added_at_once[name], parameter.grad = parameter.grad, None
        self.publish()

    def view(self, buffer: Tensor, name: str) -> Tensor:
        parameter = self._parameters[name]
        start = self._offsets[name]
        return buffer[start : start + parameter.numel()].view(parameter.shape)

    def zero(self) -> None:
        """Zero all gradients, those of an interrupted micro-batch included."""
        for name in self._added_at_once:
            self._parameters[name].grad = None
        self.grad.zero_()
        if self._compute_grad is not self.grad:
            self._compute_grad.zero_()

    def collect(self, start: int = 0, end: int | None = None) -> Tensor:
        """Add the gradients of a micro-batch to `grad`, or to its part from `start` to `end`; returns that part.

        A part begins and ends at borders of parameters.
        """
        self._add_gradients(start, len(self.grad) if end is None else end)
        summed = self.grad[start:end]
        if self._compute_grad is not self.grad:
            own = self._compute_grad[start:end]
            summed.add_(own)
            own.zero_()
        return summed

    def buckets(self, numbers: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
        """The buffer cut at borders of parameters into parts of at least `numbers` elements, except the last.

        Returns start and end of each part, and the index of each parameter's part by name.
        """
        starts, bucket_of = [0], {}
        for name, offset in self._offsets.items():
            if offset - starts[-1] >= numbers:
                starts.append(offset)
            bucket_of[name] = len(starts) - 1
        return list(zip(starts, [*starts[1:], len(self.master)], strict=True)), bucket_of

    def publish(self) -> None:
        if self._compute is not self.master:
            self._compute.copy_(self.master)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    @property
    def layout(self) -> list[list[object]]:
        """Name, offset and shape of every parameter, in order; buffers of equal layout are interchangeable."""
        return [[name, self._offsets[name], list(parameter.shape)] for name, parameter in self._parameters.items()]

    @contextlib.contextmanager
    def parameters_replaced(self, values: Tensor) -> Iterator[None]:
        """Inside the context, parameters are fp32 CPU copies of `values`, a buffer like `master`, to be saved."""
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        grads = {name: parameter.grad for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.grad = None
                parameter.data = self.view(values, name).to("cpu", copy=True)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]
                parameter.grad = grads[name]

    def release(self) -> None:
        """Give every parameter its own fp32 CPU tensor with the master's values, and no gradient."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = self.view(self.master, name).to("cpu", copy=True)

    def _add_gradients(self, start: int, end: int) -> None:
        """Add what the backward pass left in the parameters of a part of the buffer."""
        places, grads = [], []
        for name, place in self._added_at_once.items():
            parameter = self._parameters[name]
            if parameter.grad is not None and start <= self._offsets[name] < end:
                places.append(place)
                grads.append(parameter.grad)
                parameter.grad = None
        if grads:
            torch._foreach_add_(places, grads)

    def _leaf(self, name: str) -> Tensor:
        leaf = self.view(self.master, name)
        leaf.grad = self.view(self.grad, name)
        return leaf


BUCKET_NUMBERS = 4 * 1024**2
"""Least numbers of a bucket: 16 MiB, enough for the speed of a link and little enough to overlap."""


class GradientSums:
    """Sums the gradient of `flat` over at least two processes, in buckets while the backward pass still runs.

        bytes per step and process    4 · parameters · 2 (N − 1) / N, and 4 (samples of the step + 1)

    The buffer is cut into buckets at parameters' borders. In the last backward pass, a bucket's reduction starts once
    all its gradients are there, from the end of the buffer to its start, about the order of a backward pass (Li et al.
    2020, arXiv:2006.15704). Every process reduces the same buckets in the same order; one that ran out of memory sends
    what it has and reports the failure.
    """

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
        trained = {name: parameter for name, parameter in self._flat.parameters.items() if parameter.requires_grad}
        for name in trained:
            self._left[self._bucket_of[name]] += 1
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, self._bucket_of[name]))
            for name, parameter in trained.items()
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
