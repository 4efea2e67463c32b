"""What a network of ComfyUI does without regard to gradients, done so that it has them; the numbers are the same.

Sums in place, as in `x += block(x)`, are out of place while gradients are recorded: several networks change the
residual stream that a norm before has saved for its gradient, or activation checkpointing as a block's input.

Rotary embeddings by a kernel of comfy-kitchen, which has no gradient, are by its functions in torch's operations.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorasmith.training.memory.activations import blocks_at_depth

_OUT_OF_PLACE: dict[Any, Any] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}

_OPERATOR = dis.opmap["BINARY_OP"]

_here = threading.local()


class _OutOfPlace(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (other := _OUT_OF_PLACE.get(func)) is not None and torch.is_grad_enabled() and _is_statement():
            changed, by = args
            is_recorded = changed.requires_grad or (isinstance(by, Tensor) and by.requires_grad)
            if is_recorded and not _is_part(changed):  # of a part of a tensor, that tensor is meant
                if isinstance(by, Tensor) and by.dtype != changed.dtype:
                    return func(changed.clone(), by)
                return other(changed, by)
        return func(*args, **(kwargs or {}))


def _is_part(tensor: Tensor) -> bool:
    return tensor._base is not None and tensor._base.numel() != tensor.numel()


def _is_statement() -> bool:
    """Whether torch was called by `x += y` or its like, which gives x the result, and not by `x.add_(y)`."""
    frame = sys._getframe(2)
    return _code(frame.f_code)[frame.f_lasti] == _OPERATOR


@functools.lru_cache(maxsize=1000)
def _code(of: types.CodeType) -> bytes:
    return of.co_code


@contextlib.contextmanager
def sums_out_of_place() -> Iterator[None]:
    """Inside the context, on this thread."""
    if getattr(_here, "active", False):
        yield
        return
    _here.active = True
    try:
        with _OutOfPlace():
            yield
    finally:
        _here.active = False


@contextlib.contextmanager
def blocks_out_of_place(module: nn.Module) -> Iterator[None]:
    """Inside the context, also blocks that a backward pass recomputes, on a thread of its own."""
    depths = (blocks_at_depth(module, depth) for depth in range(1, 4))
    blocks = {id(block): block for blocks in depths for block in blocks if "forward" not in block.__dict__}
    try:
        for block in blocks.values():
            block.forward = types.MethodType(_forward, block.forward)
        yield
    finally:
        for block in blocks.values():
            block.__dict__.pop("forward", None)


def _forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with sums_out_of_place():
        return forward(*args, **kwargs)


@contextlib.contextmanager
def kernels_with_gradients() -> Iterator[None]:
    """Inside the context, on all threads."""
    quantized = importlib.import_module("comfy.quant_ops")
    kernels = getattr(quantized, "ck", None)
    try:
        eager = importlib.import_module("comfy_kitchen.backends.eager.rope")
    except ImportError:  # of an older ComfyUI, whose networks use none
        eager = None
    if kernels is None or eager is None:
        yield
        return
    quantized.ck = _WithGradients(kernels, eager)
    try:
        yield
    finally:
        quantized.ck = kernels


class _WithGradients:
    def __init__(self, kernels: Any, eager: Any) -> None:
        self._kernels, self._eager = kernels, eager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._eager if "rope" in name and hasattr(self._eager, name) else self._kernels, name)
