"""Kernels of comfy-kitchen that have no gradient, which its functions in torch's operations have; same numbers."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_KINDS = ("rope", "adaln")
"""Modules of functions in torch's operations, by the names of the kernels."""


@contextlib.contextmanager
def kernels_with_gradients() -> Iterator[None]:
    """Inside the context, on all threads, kernels that are given what needs a gradient have one."""
    with contextlib.ExitStack() as undo:
        for kind in _KINDS:
            try:
                kernels = importlib.import_module("comfy_kitchen")
                module = importlib.import_module(f"comfy_kitchen.backends.eager.{kind}")
            except ImportError:  # of an older ComfyUI, whose networks use none
                continue
            for name, function in vars(module).items():
                kernel = vars(kernels).get(name)
                if kind in name and callable(function) and callable(kernel):
                    undo.callback(setattr, kernels, name, kernel)
                    setattr(kernels, name, _with_gradient(kernel, function))
        yield


def _with_gradient(kernel: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = tree_leaves((args, kwargs)) if torch.is_grad_enabled() else ()
        needs_gradient = any(getattr(one, "requires_grad", False) for one in given)
        return (function if needs_gradient else kernel)(*args, **kwargs)

    return called
