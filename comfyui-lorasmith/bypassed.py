"""LoRAs that ComfyUI applies beside layers ("bypass"), in place of a layer's forward, which adapters replace in turn.

While a MODEL trains they are functions of the weights, as LoRAs of weights in host memory are, so they are below what
is trained and quantized weights stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import comfy.lora
from torch import Tensor, nn


@contextlib.contextmanager
def bypassed_in_weights(module: nn.Module, prefix: str) -> Iterator[None]:
    """Inside the context, the injected LoRAs of a loaded network are functions of its weights."""
    with contextlib.ExitStack() as undo:
        for path, layer, hook in _hooks(module):
            hook.eject()
            undo.callback(hook.inject)
            layer.__dict__.pop("forward")  # which is the class's own again
            added = functools.partial(_with_adapter, hook.adapter, hook.multiplier, f"{prefix}.{path}.weight")
            layer.weight_function.append(added)
            undo.callback(layer.weight_function.remove, added)
        yield


def bypassed_adapters(patcher: Any, prefix: str) -> dict[str, tuple[float, Any]]:
    """Strengths and adapters of a MODEL's LoRAs beside layers, by layer."""
    module, was_injected = getattr(patcher.model, prefix), patcher.is_injected
    patcher.inject_model()
    try:
        found = {path: (hook.multiplier, hook.adapter) for path, _, hook in _hooks(module)}
    finally:
        if not was_injected:
            patcher.eject_model()
    for path, layer in module.named_modules():
        for function in getattr(layer, "weight_function", ()):
            if isinstance(function, functools.partial) and function.func is _with_adapter:
                adapter, strength, *_ = function.args
                found[path] = strength, adapter
    return found


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Paths of layers whose forward is a hook's of ComfyUI, the layers, and the hooks."""
    for path, layer in list(module.named_modules()):
        hook = getattr(layer.__dict__.get("forward"), "__self__", None)
        if hasattr(hook, "original_forward") and hasattr(hook, "adapter"):
            yield path, layer, hook


def _with_adapter(adapter: Any, strength: float, key: str, weight: Tensor) -> Tensor:
    patch = (strength, adapter, 1.0, None, None)
    found: Tensor = comfy.lora.calculate_weight([patch], weight.clone(), key, intermediate_dtype=weight.dtype)
    return found
