"""Kernels of attention: which of torch's is the fastest for a step's shapes on this GPU, measured once and kept.

torch takes the first kernel of a fixed order that accepts a call, whichever is faster for the GPU, the libraries and
the shape. Here the calls of one forward pass are listed, and each kernel is timed on the tensors of each different one,
in both directions. Times are kept (`measured_times`). Kernels whose result or gradients are not those of torch's own
choice have none: versions of cuDNN had NaN and wrong gradients for some shapes.

The kernel is part of the run state, so that a resumed run keeps it, whatever is measured then.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lorasmith.core.allocator import has_lost_device
from lorasmith.core.choices import AttentionChoice, AttentionKernel
from lorasmith.core.kernels import refuse
from lorasmith.training.measured_times import FASTER, measured

KERNELS: tuple[AttentionKernel, ...] = get_args(AttentionKernel)

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_WARM_UP, _TIMED = 3, 10  # passes of a call; cuDNN plans in the first one

_TOLERANCE = 0.02
"""Difference of results relative to their norm; kernels in bf16 differ by less than a tenth of it."""


@contextlib.contextmanager
def attention_preferred(kernel: AttentionChoice) -> Iterator[None]:
    """Inside the context, attention on a GPU is computed by `kernel` where it accepts a call, otherwise by another.

    `torch`, and `auto` that was not resolved, change nothing.
    """
    if kernel not in _BACKENDS:
        yield
        return
    first = _BACKENDS[kernel]
    others = (backend for backend in _BACKENDS.values() if backend is not first)
    with sdpa_kernel([first, *others, SDPBackend.MATH], set_priority=True):
        yield


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A use of attention with certain shapes, and how often a forward pass has it."""

    name: str
    count: int
    inputs: tuple[Tensor, Tensor, Tensor]  # query, key and value
    keywords: Mapping[str, Any]


@torch.no_grad()
def calls_in(run: Callable[[], object]) -> list[AttentionCall]:
    """The different calls of attention in a forward pass."""
    with _Calls() as seen:
        run()
    return [AttentionCall(name, count, *seen.arguments[name]) for name, count in seen.counts.items()]


@dataclass(frozen=True)
class FastestKernel:
    """The kernel that is taken, and the seconds of all calls of a pass by kernel."""

    kernel: AttentionKernel
    seconds: Mapping[AttentionKernel, float]

    def __str__(self) -> str:
        if not self.seconds:
            return "Attention: torch's own choice; nothing was measured."
        times = ", ".join(f"{name} {1000 * one:.3g}" for name, one in self.seconds.items())
        name = "torch's own choice" if self.kernel == "torch" else self.kernel
        return f"Attention: {name}; milliseconds a pass: {times}. Set attention to choose another."


def fastest_kernel(calls: Sequence[AttentionCall], device: torch.device) -> FastestKernel:
    """The kernel with the least time over all calls, from the file of kept times or measured.

    It is torch's own choice unless another is faster by more than the noise of measurements.
    """
    if not calls:
        return FastestKernel("torch", {})
    known = {call.name: measured(device, call.name, partial(_by_kernel, call)) for call in calls}
    totals: dict[AttentionKernel, float] = {}
    for kernel in KERNELS:
        total = sum(call.count * known[call.name].get(kernel, math.inf) for call in calls)
        if math.isfinite(total):
            totals[kernel] = total
    best: AttentionKernel = min(totals, key=totals.__getitem__, default="torch")
    is_faster = best in totals and totals[best] < FASTER * totals.get("torch", math.inf)
    return FastestKernel(best if is_faster else "torch", totals)


def _by_kernel(call: AttentionCall) -> dict[str, float]:
    own = _attempted("torch", call)
    return {
        kernel: kernel_seconds(kernel, call)
        for kernel in KERNELS
        if kernel == "torch" or _agrees(own, _attempted(kernel, call), kernel, call)
    }


def _pass(kernel: AttentionChoice, call: AttentionCall) -> tuple[Tensor, ...]:
    """The result of a forward pass of a call, and the gradients of its inputs for the result as the gradient."""
    query, key, value = inputs = [one.detach().requires_grad_() for one in call.inputs]
    with torch.enable_grad(), attention_preferred(kernel):
        result = F.scaled_dot_product_attention(query, key, value, **call.keywords)
        return result.detach(), *torch.autograd.grad(result, inputs, result.detach())


def _attempted(kernel: AttentionChoice, call: AttentionCall) -> tuple[Tensor, ...] | None:
    """`_pass`, or None where it fails: of memory, or of a library that has no plan for the shape."""
    try:
        return _pass(kernel, call)
    except RuntimeError as error:
        if has_lost_device(error):
            raise
        return None


def _agrees(
    own: tuple[Tensor, ...] | None, found: tuple[Tensor, ...] | None, kernel: AttentionKernel, call: AttentionCall
) -> bool:
    if own is None or found is None:
        return False
    for name, expected, one in zip(("result", "query", "key", "value"), own, found, strict=True):
        error, norm = ((one - expected).float().norm(), expected.float().norm())
        if not bool(error <= _TOLERANCE * norm):  # NaN compares as false
            refuse(
                f"Attention by {kernel} is not used for {call.name}, as its "
                f"{'result' if name == 'result' else f'gradient of the {name}'} is not torch's on this device; report "
                "it with the output of lorasmith doctor."
            )
            return False
    return True


def kernel_seconds(
    kernel: AttentionKernel, call: AttentionCall, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one forward and backward pass of a call on its GPU; infinite where that fails."""
    device = call.inputs[0].device
    try:
        for _ in range(_WARM_UP):
            _pass(kernel, call)
        torch.cuda.synchronize(device)
        began = clock()
        for _ in range(_TIMED):
            _pass(kernel, call)
        torch.cuda.synchronize(device)
        return (clock() - began) / _TIMED
    except RuntimeError as error:
        if has_lost_device(error):
            raise
        return math.inf


class _Calls(TorchFunctionMode):
    """Counts calls of attention by name, and keeps the arguments of the first of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.arguments: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **further: Any,
    ) -> None:
        keywords = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **further}
        shapes = [f"{one.dtype} {tuple(one.shape)}" for one in (query, key, value, attn_mask) if one is not None]
        name = ", ".join(shapes).replace("torch.", "") + (", causal" if is_causal else "")
        self.counts[name] += 1
        self.arguments.setdefault(name, ((query, key, value), keywords))
