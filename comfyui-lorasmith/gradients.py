"""What networks do without a gradient, done with one: kernels of comfy-kitchen, experts, what is kept of a prompt."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_KINDS = ("rope", "adaln")
"""Modules of functions in torch's operations, by the names of the kernels."""


@contextlib.contextmanager
def kernels_with_gradients() -> Iterator[None]:
    """Inside the context, on all threads, kernels of comfy-kitchen that are given what needs a gradient have one.

    They are replaced by its functions in torch's operations, which have the same numbers.
    """
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


@contextlib.contextmanager
def experts_with_gradients(module: nn.Module) -> Iterator[None]:
    """Inside the context, experts compute as in training: Hunyuan 3D 2.1 evaluates them under `torch.no_grad`.

    Their gate's loss of balance, which its authors and ComfyUI's node train with, is then part of the gradient.
    """
    mixtures = (layer for layer in module.modules() if hasattr(layer, "moe_infer"))
    changed = [part for layer in mixtures for part in layer.modules() if not part.training]
    try:
        for part in changed:
            part.training = True
        yield
    finally:
        for part in changed:
            part.training = False


@contextlib.contextmanager
def prompts_computed_anew(module: nn.Module) -> Iterator[None]:
    """Around one evaluation, a network keeps nothing of prompts: HiDream-O1 keeps their keys and values for the next.

    Those of an earlier one have no gradient, or another LoRA.
    """
    forget = getattr(module, "clear_kv_cache", lambda: None)
    forget()
    try:
        yield
    finally:
        forget()
