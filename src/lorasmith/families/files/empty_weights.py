"""Modules without weights: parameters are on the meta device, and no time is spent on random numbers for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["weights_empty"]


@contextlib.contextmanager
def weights_empty() -> Iterator[None]:
    """Modules that are created inside have their parameters on the meta device; buffers keep their values."""
    from accelerate import init_empty_weights

    with init_empty_weights(), _InitializationSkipped():
        yield


class _InitializationSkipped(TorchFunctionMode):
    """Initializers do nothing to tensors on the meta device; they would take most of the time of text encoders."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func.__name__ in _INITIALIZERS:
            target = args[0] if args else given.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **given)


# Of torch.Tensor and torch.nn.init.
_INITIALIZERS = frozenset(
    f"{name}_"
    for name in ("normal", "uniform", "trunc_normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform",
                 "xavier_normal", "zero", "zeros", "ones", "fill", "constant")
)  # fmt: skip
