"""Time of products, of other operations, and between operations, from torch's profiler."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

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
