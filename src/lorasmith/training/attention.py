"""Kernels of attention: which of torch's is the fastest for a step's shapes on this GPU, measured once and kept.

torch takes the first kernel of a fixed order that accepts a call, whichever is faster for the GPU, the libraries and
the shape. Here the calls of one forward pass are listed, and each kernel is timed on the tensors of each different one,
in both directions. Times are kept by GPU, driver, versions and shape, in a file of the user's cache:

    attention.json = {<machine>: {<call>: {<kernel>: <seconds>}}}

The kernel is part of the run state, so that a resumed run keeps it, whatever is measured then.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lorasmith.core.allocator import has_lost_device
from lorasmith.core.choices import AttentionChoice, AttentionKernel
from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import typed
from lorasmith.data.encoding_cache import default_cache, ensure_private

KERNELS: tuple[AttentionKernel, ...] = get_args(AttentionKernel)

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_FASTER = 0.97  # part of the time of torch's own choice below which another is taken; less is within the noise
_WARM_UP, _TIMED = 3, 10  # passes of a call; cuDNN plans in the first one

Times = dict[str, float]
"""Seconds of one call, forward and backward, by kernel; kernels that failed are missing."""


@contextlib.contextmanager
def attention_preferred(kernel: AttentionChoice) -> Iterator[None]:
    """Inside the context, attention on a GPU is computed by `kernel` where it accepts a call, otherwise by another.

    `torch`, and `auto` that was not resolved, change nothing.
    """
    if kernel not in _BACKENDS:
        yield
        return
    first = _BACKENDS[kernel]
    others = (one for one in _BACKENDS.values() if one is not first)
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
    kept, machine = _read(), machine_of(device)
    known = kept.setdefault(machine, {})
    missing = [call for call in calls if call.name not in known]
    for call in missing:
        known[call.name] = {
            kernel: seconds for kernel in KERNELS if math.isfinite(seconds := kernel_seconds(kernel, call))
        }
    if missing:
        _write(kept)
    totals: dict[AttentionKernel, float] = {}
    for kernel in KERNELS:
        total = sum(call.count * known[call.name].get(kernel, math.inf) for call in calls)
        if math.isfinite(total):
            totals[kernel] = total
    best: AttentionKernel = min(totals, key=totals.__getitem__, default="torch")
    is_faster = best in totals and totals[best] < _FASTER * totals.get("torch", math.inf)
    return FastestKernel(best if is_faster else "torch", totals)


def kernel_seconds(
    kernel: AttentionKernel, call: AttentionCall, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one forward and backward pass of a call on its GPU; infinite where that fails."""
    query, key, value = inputs = [one.detach().requires_grad_() for one in call.inputs]

    def once() -> None:
        with torch.enable_grad():
            result = F.scaled_dot_product_attention(query, key, value, **call.keywords)
            torch.autograd.grad(result, inputs, result.detach())

    device = query.device
    try:
        with attention_preferred(kernel):
            for _ in range(_WARM_UP):
                once()
            torch.cuda.synchronize(device)
            began = clock()
            for _ in range(_TIMED):
                once()
            torch.cuda.synchronize(device)
            return (clock() - began) / _TIMED
    except RuntimeError as error:  # of memory, or of a library that has no plan for the shape
        if has_lost_device(error):
            raise
        return math.inf


def machine_of(device: torch.device) -> str:
    """What times depend on beside the call."""
    library: Any = torch._C  # whose names differ by how torch was built
    driver = library._cuda_getDriverVersion()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, {versions}"


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


def _path() -> Path | None:
    """The file of times; None without a folder for caches."""
    cache = default_cache()
    return cache.folder.parent / "attention.json" if cache.limit_bytes else None


def _read() -> dict[str, dict[str, Times]]:
    if (path := _path()) is None:
        return {}
    try:
        return typed(parse_foreign_json(read_regular(path)), dict[str, dict[str, Times]])
    except (OSError, ValueError):
        return {}


def _write(kept: Mapping[str, Mapping[str, Times]]) -> None:
    if (path := _path()) is not None:
        with contextlib.suppress(LorasmithError, OSError):  # they are measured again
            ensure_private(path.parent)
            write_atomic(path, json.dumps(kept, indent=1))
