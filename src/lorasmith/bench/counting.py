"""Torch operations counted and timed.

The counter has their number, FLOPs, live bytes, and bytes copied to the device. These are deterministic; memory inside
kernels (scratch memory, their own copies) is not counted. torch's profiler has the time of products, of other
operations, and between operations.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_flops: Callable[..., int] = sdpa_flop_count
_backward_flops: Callable[..., int] = sdpa_backward_flop_count
_aten = torch.ops.aten


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(_flops(query.shape, key.shape, value.shape))


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(_backward_flops(grad.shape, query.shape, key.shape, value.shape))


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's table of FLOP formulas lacks attention on the CPU.
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations inside its context, which may be entered repeatedly; frees are also counted outside.

    `operations` exclude views; `flops` are of products and attention, a multiplication and an addition being two.
    `live` are bytes of `device` allocated inside and not yet freed, `peak` the highest of these, `held` the highest at
    the start of a backward pass (the saved activations). `sent` are bytes copied to the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._sizes: dict[int, int] = {}
        self._backward = -1
        self.live = 0
        self.reset()

    def reset(self) -> None:
        """Reset all counts but `live`."""
        self.operations = self.flops = self.sent = self.held = 0
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._notice_backward()
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {one.untyped_storage()._cdata for one in inputs}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        fresh = [one for one in made if one.untyped_storage()._cdata not in known]
        self.operations += bool(fresh) or func._schema.is_mutable
        for one in fresh:
            self._follow(one)
        if any(one.device.type != self._device.type for one in inputs if one.ndim):
            self.sent += sum(one.nbytes for one in fresh if one.device.type == self._device.type)
        return result

    def _notice_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        # Recomputing a block starts no backward pass of its own, so each pass is counted once.
        if task not in (-1, self._backward):
            self.held = max(self.held, self.live)
        self._backward = task if task != -1 else self._backward

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != self._device.type or storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage._cdata).atexit = False

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


_PRODUCT = re.compile(r"aten::_?(add|b|badd|scaled_)?b?mm\b|convolution|attention|aten::(linear|_slow_conv|_conv)")
_MOST = 8
_QUIET = "6"  # log level of the profiler's library, which otherwise reports every start and stop on standard error


@dataclass(frozen=True)
class Profile:
    """Seconds of one step or pass, profiling overhead included."""

    whole: float
    products: float  # matrix products, convolutions and attention
    others: float  # other operations
    longest: Mapping[str, float]  # the longest operations, by name

    @property
    def between(self) -> float:
        """Time without a running operation: Python, launching operations, and on a GPU waiting for the host."""
        return max(0.0, self.whole - self.products - self.others)


def profiled(once: Callable[[], None], device: torch.device) -> Profile:
    """Profile one call."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", _QUIET)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        once()
        if on_gpu:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - start
    times: dict[str, float] = {}
    kernels = 0.0
    for event in seen.key_averages():
        if event.device_type.name == "CPU":
            # On a GPU, the kernels that an operation launched.
            times[event.key] = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        elif not event.is_user_annotation:
            kernels += event.self_device_time_total / 1e6
    products = sum(seconds for name, seconds in times.items() if _PRODUCT.search(name))
    ran = kernels if on_gpu else sum(seconds for name, seconds in times.items() if name.startswith("aten::"))
    longest = dict(sorted(times.items(), key=lambda one: one[1], reverse=True)[:_MOST])
    return Profile(whole, products, max(0.0, ran - products), longest)
