"""What a network of ComfyUI does without regard to gradients, done so that it has them; the numbers are the same.

Sums in place, as in `x += block(x)`, are out of place while gradients are recorded: several networks change the
residual stream that a norm before has saved for its gradient, or activation checkpointing as a block's input.

Rotary embeddings by a kernel of comfy-kitchen, which has no gradient, are by its functions in torch's operations.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_OUT_OF_PLACE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "__iadd__": torch.add,
    "__isub__": torch.sub,
    "__imul__": torch.mul,
    "__itruediv__": torch.div,
}
"""By what `x += y` and its like call, which give x the result; `x.add_(y)` calls none of them."""


@contextlib.contextmanager
def sums_out_of_place() -> Iterator[None]:
    """Inside the context, on all threads: a backward pass that recomputes blocks has one of its own."""
    own = {name: vars(Tensor).get(name) for name in _OUT_OF_PLACE}  # else inherited
    try:
        for name, other in _OUT_OF_PLACE.items():
            setattr(Tensor, name, _statement(getattr(Tensor, name), other))
        yield
    finally:
        for name, function in own.items():
            if function is not None:
                setattr(Tensor, name, function)
            elif name in vars(Tensor):
                delattr(Tensor, name)


def _statement(in_place: Callable[..., Tensor], other: Callable[..., Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def statement(changed: Tensor, by: Any) -> Tensor:
        is_recorded = changed.requires_grad or (isinstance(by, Tensor) and by.requires_grad)
        if not is_recorded or not torch.is_grad_enabled() or _is_part(changed):  # of a part, the whole is meant
            return in_place(changed, by)
        if isinstance(by, Tensor) and by.dtype != changed.dtype:
            return in_place(changed.clone(), by)
        return other(changed, by)

    return statement


def _is_part(tensor: Tensor) -> bool:
    return tensor._base is not None and tensor._base.numel() != tensor.numel()


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
