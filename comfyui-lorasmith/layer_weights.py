"""Weights of a MODEL's layers as its own casts give them, for the products of adapters.

ComfyUI keeps a weight where and as it is (in host memory, in another dtype, quantized, below a LoRA of the MODEL) and
casts it whenever a layer is used. `CastWeight` asks for that cast, and gives the weight back afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import PRODUCTS, FrozenLayer, FrozenProduct, is_linear, is_targetable
from lorasmith.core.quantization import WEIGHT_SOURCE, Packed, WeightSource

from .products import faster_products

_MAY_OFFLOAD = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters


class CastWeight(WeightSource):
    """The weight of a layer, cast by ComfyUI to a device and dtype for each product."""

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._layer = layer
        self._place: dict[str, Any] = {"device": device, "dtype": dtype}

    def use(self) -> _Cast:
        return _Cast(self._layer, self._place)

    def bias(self, layer: nn.Module) -> Tensor | None:
        bias: Tensor | None = getattr(layer, "bias", None)
        if bias is None:
            return None
        if hasattr(layer, _UNPACK):
            return _unpacked(layer, bias, **self._place)
        bias = comfy.model_management.cast_to(bias, **self._place)
        for function in getattr(layer, "bias_function", ()):
            bias = function(bias)
        return bias


class _Cast:
    """The cast weight, inside of the context alone."""

    def __init__(self, layer: nn.Module, place: dict[str, Any]) -> None:
        self._layer, self._place = layer, place
        self._cast: tuple[Any, ...] = ()

    def __enter__(self) -> Packed:
        place = {**self._place, "bias_dtype": self._place["dtype"]}
        if hasattr(self._layer, _UNPACK):
            weight = _unpacked(self._layer, self._layer.weight, **self._place)  # type: ignore[arg-type]
        elif _MAY_OFFLOAD:
            self._cast = comfy.ops.cast_bias_weight(self._layer, offloadable=True, **place)
            weight = self._cast[0]
        else:
            weight, _ = comfy.ops.cast_bias_weight(self._layer, **place)
        if type(weight) is not Tensor:  # a Parameter, or a quantized tensor that casts leave as it is
            weight = weight.dequantize() if hasattr(weight, "dequantize") and not _is_plain(weight) else weight.data
        return Packed((weight,), _same, self._place["dtype"], weight.shape)

    def __exit__(self, *error: object) -> None:
        if self._cast:
            comfy.ops.uncast_bias_weight(self._layer, *self._cast)
            self._cast = ()


_UNPACK = "get_weight"
"""Method of layers of ComfyUI-GGUF, from a packed parameter and a dtype to a tensor with the MODEL's patches."""


def _unpacked(layer: Any, parameter: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    found: Tensor = getattr(layer, _UNPACK)(parameter.to(device), dtype)
    return comfy.model_management.cast_to(found.as_subclass(Tensor), dtype, device)


def _same(weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    return weight


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def cast_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a MODEL that can carry adapters and whose weight ComfyUI may cast."""
    for layer in module.modules():
        if hasattr(layer, "comfy_cast_weights") and getattr(layer, "weight", None) is not None and is_targetable(layer):
            yield layer


def _is_cast(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    tensors = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    there = all(_is_plain(tensor) and tensor.device == device and tensor.dtype == dtype for tensor in tensors)
    return not there or bool(layer.weight_function) or bool(layer.bias_function)


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is its class's, which ComfyUI sets anew where it takes back a replacement."""
    forward = layer.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(layer).forward


@contextlib.contextmanager
def casts_on_use(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context, products with weights that ComfyUI casts get them from a `CastWeight`, or are faster ones.

    Layers compute in `dtype`, in which adapters are; an input of another dtype is cast, and the result cast back.
    """
    products = faster_products(device, dtype)
    with contextlib.ExitStack() as undo:
        for layer in cast_layers(module):
            others: dict[str, Any] = {}
            factor = None  # of the input
            is_own = _has_own_forward(layer)  # what replaces a forward knows what is unknown here
            if _is_cast(layer, device, dtype):
                others[WEIGHT_SOURCE] = CastWeight(layer, device, dtype)
                factor = getattr(layer, "pre_quant_scale", None) if is_own else None
            if products is not None and is_linear(layer):
                others[PRODUCTS] = products
            if others and is_own:
                others["forward"] = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__
            for name, value in others.items():
                setattr(layer, name, value)
                undo.callback(layer.__dict__.pop, name, None)
            cast = _InDtype(dtype, factor)
            undo.callback(layer.register_forward_pre_hook(cast.before).remove)
            undo.callback(layer.register_forward_hook(cast.after).remove)
        yield


@contextlib.contextmanager
def norms_resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the context, weights of norms and the like are on `device`, where ComfyUI has left them in host memory.

    Their gradients need the weights of the forward pass, and ComfyUI casts into buffers that the next cast overwrites.
    """
    with contextlib.ExitStack() as undo:
        for layer in module.modules():
            if not hasattr(layer, "comfy_cast_weights") or is_targetable(layer) or isinstance(layer, nn.Embedding):
                continue
            for name, tensor in list(layer._parameters.items()):
                if tensor is not None and tensor.device != device:
                    layer._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)
                    undo.callback(layer._parameters.__setitem__, name, tensor)
        yield


class _InDtype:
    """Hooks of a layer whose input may have another dtype than its adapter, or be that of its weight times a factor."""

    def __init__(self, dtype: torch.dtype, factor: Tensor | None) -> None:
        self._dtype, self._factor = dtype, factor
        self._given: torch.dtype | None = None

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        first = args[0] if args else None
        is_other = isinstance(first, Tensor) and first.dtype != self._dtype
        self._given = first.dtype if is_other else None
        if self._factor is not None:
            first = first.to(self._dtype) * self._factor.to(first.device, self._dtype)
            return (first, *args[1:])
        return (first.to(self._dtype), *args[1:]) if is_other else None

    def after(self, layer: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return None if self._given is None else result.to(self._given)


def inference_tensors_opened(module: nn.Module) -> contextlib.ExitStack:
    """Inside the context, a MODEL that was loaded in inference mode has ordinary tensors on the same memory."""
    undo = contextlib.ExitStack()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_inference() and _is_plain(tensor):
                    tensors[name] = _opened(tensor)  # type: ignore[assignment]
                    undo.callback(tensors.__setitem__, name, tensor)
    return undo


def _opened(tensor: Tensor) -> Tensor:
    same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    same.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(same, requires_grad=False) if isinstance(tensor, nn.Parameter) else same
