"""Norm and bias differences: added to parameters that no low-rank product fits (LyCORIS' Norm, ComfyUI's BiasDiff).

    weight' = weight + Δ   of a norm,   bias' = bias + Δ   of any layer

A norm's output is linear in its weight and bias, so it is norm(x; weight, bias) + norm(x; Δ, Δ'): half precision would
lose a small Δ in the sum of the weights. Files call these tensors `diff` and `diff_b`, or `w_norm` and `b_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import LoraError


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a one-dimensional weight of its own, by which norms scale their output."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


class Difference(nn.Module):
    """Additive differences of one module's parameters."""

    def __init__(self, differences: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in differences.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def create(cls, module: nn.Module) -> Difference:
        """Zeros for a norm's weight and bias, or for a layer's bias."""
        names = ("weight", "bias") if is_norm(module) else ("bias",)
        parameters = {name: getattr(module, name) for name in names if getattr(module, name, None) is not None}
        return cls({name: torch.zeros(parameter.shape) for name, parameter in parameters.items()})

    @classmethod
    def from_tensors(cls, differences: Mapping[str, Tensor], module: nn.Module, path: str) -> Difference:
        """Differences with given values. Raises LoraError when they do not fit the module."""
        for name, tensor in differences.items():
            shape = getattr(getattr(module, name, None), "shape", None)
            if shape != tensor.shape:
                found = "which it lacks" if shape is None else f"which has shape {tuple(shape)}"
                raise LoraError(
                    f"a difference of shape {tuple(tensor.shape)} is for {path}.{name}, {found}; "
                    "the LoRA was made for another model"
                )
        return cls({name: t.detach().to("cpu", torch.float32, copy=True) for name, t in differences.items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """The differences as data, in fp32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.named_parameters()}

    def on_norm(self, norm: nn.Module, forward: Callable[..., Tensor], strength: float) -> Callable[..., Tensor]:
        """A norm's forward with the differences added to its current parameters."""

        def changed(*args: Any, **kwargs: Any) -> Tensor:
            return forward(*args, **kwargs) + strength * self._alone(norm, forward, *args, **kwargs)

        return changed

    def _alone(self, norm: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The forward with the differences in place of the norm's parameters."""
        own, mine = norm._parameters, dict(self.named_parameters())
        kept = dict(own)
        try:
            for name, parameter in kept.items():
                if parameter is not None:
                    own[name] = mine[name] if name in mine else nn.Parameter(torch.zeros_like(parameter), False)
            return forward(*map(_with_gradient, args), **kwargs)
        finally:
            own.update(kept)


def _with_gradient(value: Any) -> Any:
    """An input that requires a gradient: torch's channels-last group norm (2.13, CPU) crashes if only weights do."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad and torch.is_grad_enabled():
        return value.detach().requires_grad_()
    return value
