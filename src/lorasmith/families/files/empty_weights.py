"""Modules without weights: parameters are on the meta device, and no time is spent on random numbers for them.

This concerns the calling thread alone: a server reads the structure of one model while another thread creates adapters.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

__all__ = ["weights_empty"]


@contextlib.contextmanager
def weights_empty() -> Iterator[None]:
    """Modules that are created inside have their parameters on the meta device; buffers keep their values."""
    depth = getattr(_thread, "depth", 0)
    _thread.depth = depth + 1
    try:
        with _InitializationSkipped():
            yield
    finally:
        _thread.depth = depth


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter to register instead; None for no other."""
    if parameter is None or parameter.is_meta or not getattr(_thread, "depth", 0):
        return None
    empty = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


_thread = threading.local()

# Once and for good: to take it away would break threads that register parameters just then.
register_module_parameter_registration_hook(cast(Callable[..., None], _emptied))


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
