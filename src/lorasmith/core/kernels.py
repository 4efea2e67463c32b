"""Kernels in Triton that stand for functions of torch: whether one runs here and is right, and if not, why."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lorasmith.core.allocator import has_lost_device, is_out_of_memory
from lorasmith.core.printable import first_line

_REFUSALS: list[str] = []


@dataclass(frozen=True)
class Kernel:
    """What computes a function on a device."""

    name: str  # of the function
    run: Callable[..., Any]
    refusal: str = ""  # a sentence on why it is not the Triton kernel; empty if it is, or if the device has none


def refused_kernels(since: int = 0) -> Sequence[str]:
    """A sentence for each kernel that this process tried and does not use, after the first `since` of them."""
    return _REFUSALS[since:]


def refuse(refusal: str) -> None:
    """Add a sentence on a kernel that is not used to `refused_kernels`."""
    _REFUSALS.append(refusal)


def kernel_or(
    name: str,
    plain: Callable[..., Any],
    load: Callable[[], Callable[..., Any]],
    trials: Sequence[Sequence[Any]],
    *,
    expected: Callable[..., Any] | None = None,
    tolerance: float = 0.0,
) -> Kernel:
    """What `load` imports, if it returns what is `expected` of it, else `plain`, and a sentence in `refused_kernels`.

    Raises what the device raises when it is out of memory or lost, which says nothing of the kernel.

    Args:
        name: of the function, such as `rotary embeddings`.
        trials: arguments of calls.
        expected: of these arguments; by default `plain`.
        tolerance: by which numbers may differ.
    """
    wanted = [(expected or plain)(*trial) for trial in trials]
    try:
        kernel = load()
        found = [kernel(*trial) for trial in trials]
    except Exception as error:  # Triton has errors of many classes: about packages, drivers and compilers
        if not is_refusal(error):
            raise
        reason = _reason(error)
    else:
        pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
        if all(torch.allclose(a.cpu().float(), b.cpu().float(), rtol=0.0, atol=tolerance) for a, b in pairs):
            return Kernel(name, kernel)
        reason = "its numbers are not torch's on this device; report it with the output of lorasmith doctor"
    refusal = f"The Triton kernel for {name} is not used, and torch's operations, which are slower, are: {reason}."
    refuse(refusal)
    return Kernel(name, plain, refusal)


def is_refusal(error: Exception) -> bool:
    """Whether an error in a trial means that the device cannot do it, and not that it is out of memory or lost."""
    return not is_out_of_memory(error) and not has_lost_device(error)


def _reason(error: Exception) -> str:
    if find_spec("triton") is None:
        return "Triton is not installed; install triton, on Windows triton-windows"
    # Triton compiles launchers for its kernels with the C compiler when they first run.
    if isinstance(error, subprocess.CalledProcessError) or "c compiler" in str(error).lower():
        return "Triton needs a C compiler and Python's headers; install them (gcc and python3-dev on Debian)"
    if isinstance(error, PermissionError) or any(part in str(error).lower() for part in _NO_FOLDER):
        return (
            "Triton needs a folder in which compiled code may be written and executed, but fails "
            f"({first_line(error)}); set TRITON_CACHE_DIR to such a folder"
        )
    return f"it fails with {type(error).__name__} ({first_line(error)}); report it with the output of lorasmith doctor"


_NO_FOLDER = ("failed to map segment", "read-only file system")
"""What systems say of code on a mount that executes none, as of /tmp in containers, and of one without writing."""
