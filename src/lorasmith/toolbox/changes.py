"""The change of a weight by an adapter, as a matrix (out, in · kernel) with rows in memory order.

LoRA, LoHa, LoKr and full differences add a ΔW that depends on their tensors alone. DoRA scales the sum with W, and OFT,
BOFT and GLoRA transform W, so their change depends on the weight. The formulas are those of `Adapter.merged`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import format_of
from lorasmith.adapters.inject import load_adapters
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.formats.names.spelling import ModuleTensors, without_core
from lorasmith.formats.scales import scale_of
from lorasmith.toolbox.lowrank import Change, Truncated, stacked


def is_low_rank(weights: AdapterWeights) -> bool:
    """Whether the change is scale · up · down, with or without magnitudes."""
    return format_of(weights).is_low_rank


def is_plain_lora(weights: AdapterWeights) -> bool:
    """Whether the change is scale · up · down, without magnitudes."""
    return is_low_rank(weights) and "dora_scale" not in weights.tensors


def is_additive(weights: AdapterWeights) -> bool:
    """Whether the change is the same for every weight."""
    return format_of(weights).is_additive and "dora_scale" not in weights.tensors


def factors_of(weights: AdapterWeights) -> Change:
    """up · down of a LoRA, unscaled, in fp32; a Tucker core is multiplied in, magnitudes are left out."""
    tensors = without_core(weights).tensors
    return Change((tensors["up"].float().flatten(1), tensors["down"].float().flatten(1)))


def added_by(module: ModuleTensors, shape: tuple[int, ...] | None = None) -> Change:
    """The sum of a module's additive changes of its weight at strength 1.

    `shape` is the weight's; None derives it from the tensors.
    """
    changes = []
    if (weights := module.adapter) is not None:
        if is_low_rank(weights):
            changes.append(factors_of(weights).times(scale_of(weights)))
        else:
            empty = torch.zeros(shape or weight_shape(weights))
            changes.append(Change(dense=merged_weight(module, layer_like(None, empty), empty, 1.0).flatten(1)))
            return changes[0]
    if "weight" in module.differences:
        difference = module.differences["weight"].float()
        changes.append(Change(dense=difference.reshape(len(difference), -1)))
    return stacked(*changes)


def as_lora(cut: Truncated, shape: tuple[int, ...], alpha: float) -> AdapterWeights:
    """A truncated matrix (out, in · kernel) as a LoRA for a weight of `shape` (out, in, *kernel)."""
    point = (1,) * (len(shape) - 2)
    tensors = {
        "down": cut.down.reshape(cut.rank, *shape[1:]).contiguous(),
        "up": cut.up.reshape(-1, cut.rank, *point).contiguous(),
    }
    return AdapterWeights("lora", tensors, alpha)


def merged_weight(module: ModuleTensors, layer: nn.Module, weight: Tensor, strength: float) -> Tensor:
    """`weight` with adapter and difference folded in, in its dtype; fp32 avoids rounding between several modules.

    `layer` gives kind and geometry. Raises LoraError if the adapter does not fit it, or its algorithm is unknown.
    """
    if module.adapter is not None:
        adapter = load_adapters(nn.ModuleDict({"layer": layer}), {"layer": module.adapter})["layer"]
        weight = adapter.to(weight.device).merged(weight, strength).detach()
    if "weight" in module.differences:
        weight = added(weight, module.differences["weight"], strength)
    return weight


def added(tensor: Tensor, difference: Tensor, strength: float) -> Tensor:
    """`tensor + strength · difference`, computed in fp32, in the tensor's dtype.

    Raises LoraError if the numbers of elements differ.
    """
    if difference.numel() != tensor.numel():
        raise LoraError(
            f"a difference must have the shape of what it changes, {tuple(tensor.shape)}, and has "
            f"{tuple(difference.shape)}; take files that were trained on the same model"
        )
    total = torch.add(tensor.float(), difference.reshape(tensor.shape).to(tensor.device, torch.float32), alpha=strength)
    return total.to(tensor.dtype)


def layer_like(module: nn.Module | None, weight: Tensor) -> nn.Module:
    """A layer with a given weight, of the kind of `module`, or if that is None, of a kind that fits the weight."""
    parameter = nn.Parameter(weight, requires_grad=False)
    if module is None:
        with torch.device("meta"):
            module = nn.Linear(1, 1) if weight.ndim == 2 else _CONVOLUTIONS[weight.ndim - 3](1, 1, 1)
    layer = copy.copy(module)
    layer._parameters = {**module._parameters, "weight": parameter}
    return layer


def weight_shape(weights: AdapterWeights) -> tuple[int, ...]:
    """Shape of an additive adapter's weight, as far as its tensors determine it: kernels may be flattened."""
    return format_of(weights).shape_of(weights)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
