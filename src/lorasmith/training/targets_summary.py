"""Summary of a choice of targets from the model's structure: kinds of layers, parameters, file size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, is_targetable
from lorasmith.adapters.inject import AdapterPlan, PlannedAdapter, create_adapters
from lorasmith.core.placement import dtype_from_name
from lorasmith.families.model import Denoiser
from lorasmith.formats.spelling import without_core
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import fresh_differences, resolve_targets, variant_of
from lorasmith.training.notes import notes_on_plan
from lorasmith.training.trainable import Trainable, trainable

_HEADER_BYTES = 130  # per tensor of a safetensors file: its name, dtype, shape and offset


@dataclass(frozen=True)
class TargetGroup:
    """Layers of one kind: the same place in repeated blocks, and the same settings."""

    name: str  # their module paths, with `*` for repeated parts
    layer: str  # `Linear`, `Conv2d 3×3`, or the class of a norm
    count: int
    ranks: tuple[int, int]  # lowest and highest
    alpha: float | None  # None for the run's, as `learning_rate`
    learning_rate: float | None
    parameters: int  # number of trained parameters of all layers


@dataclass(frozen=True)
class TargetSummary:
    """A choice of targets."""

    targets: str  # as text
    groups: tuple[TargetGroup, ...]  # in the model's order; differences of norms and biases come last
    layers: int  # number of trained layers
    targetable: int  # number of layers that can be trained
    parameters: int  # number of trained parameters
    size_bytes: int  # of the file, to a few percent
    notes: tuple[str, ...]  # remarks for the user, one sentence each


def summarise_targets(model: Trainable | Denoiser, config: TrainConfig) -> TargetSummary:
    """Summarise what `config` would train. The model may be on the meta device. Raises OptionError."""
    model = trainable(model)
    config = replace(config, targets=config.targets or model.facts.defaults.targets)
    plan = resolve_targets(model, config)
    sizes: dict[object, _Size] = {}
    members: dict[tuple[str, str, float | None, float | None], list[tuple[PlannedAdapter, _Size]]] = {}
    for adapter in plan.adapters:
        module = model.module.get_submodule(adapter.path)
        alike = (type(module), module.weight.shape, getattr(module, "groups", 1), replace(adapter, path=""))
        if alike not in sizes:
            sizes[alike] = _size(module, adapter, config)
        key = (_kind(adapter.path), _layer_name(module), adapter.alpha, adapter.learning_rate)
        members.setdefault(key, []).append((adapter, sizes[alike]))
    groups = []
    for (name, layer, alpha, learning_rate), group in members.items():
        ranks, parameters = [planned.rank for planned, _ in group], sum(size.trained for _, size in group)
        groups.append(TargetGroup(name, layer, len(group), (min(ranks), max(ranks)), alpha, learning_rate, parameters))
    differences = fresh_differences(model, plan, config)
    changed = {path: sum(p.numel() for p in difference.parameters()) for path, difference in differences.items()}
    groups += _difference_groups(model.module, changed)
    saved = [size for member in members.values() for _, size in member]
    saved += [_Size(numbers, numbers, 2) for numbers in changed.values()]
    width = dtype_from_name(config.lora_dtype).itemsize
    return TargetSummary(
        targets=config.targets or "",
        groups=tuple(groups),
        layers=len(plan.adapters),
        targetable=sum(map(is_targetable, model.module.modules())),
        parameters=sum(size.trained for size in saved),
        size_bytes=sum(size.saved * width + size.tensors * _HEADER_BYTES for size in saved),
        notes=notes_on_plan(plan),
    )


@dataclass(frozen=True)
class _Size:
    trained: int
    saved: int
    tensors: int


def _size(module: nn.Module, planned: PlannedAdapter, config: TrainConfig) -> _Size:
    """Parameter count and tensors of a layer's adapter, counted on an adapter for a layer of zeros."""
    # Same parameters as LoRA, without decompositions.
    variant = replace(variant_of(config), pissa=False, started=False, orthogonal=False)
    (adapter,) = create_adapters(
        nn.ModuleDict({"layer": _zeros_like(module)}),
        AdapterPlan((replace(planned, path="layer"),)),
        algorithm=config.algorithm,
        alpha=None,
        seed=0,
        zero="up",
        variant=variant,
    ).values()
    tensors = without_core(adapter.to_weights()).tensors  # as the portable layout has them
    # A start that is not zero is saved as well, at twice the rank.
    copies = 2 if config.pissa or config.init or config.tlora == "orthogonal" else 1
    saved = sum(t.numel() * (copies if name != "dora_scale" else 1) for name, t in tensors.items())
    return _Size(sum(p.numel() for p in adapter.parameters()), saved, len(tensors) + 1)


def _zeros_like(module: nn.Module) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, CONVOLUTIONS):
            kind: Any = type(module)
            sizes = (module.in_channels, module.out_channels, module.kernel_size)
            layer: nn.Module = kind(*sizes, groups=module.groups, bias=False)
        else:
            frozen = FrozenLayer(module)
            layer = nn.Linear(frozen.in_features, frozen.out_features, bias=False)
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    layer.get_parameter("weight").zero_()
    return layer


def _difference_groups(model: nn.Module, changed: dict[str, int]) -> list[TargetGroup]:
    members: dict[tuple[str, str], list[int]] = {}
    for path, numbers in changed.items():
        module = model.get_submodule(path)
        what = f"{type(module).__name__} bias" if is_targetable(module) else type(module).__name__
        members.setdefault((_kind(path), what), []).append(numbers)
    return [
        TargetGroup(name, what, len(numbers), (0, 0), None, None, sum(numbers))
        for (name, what), numbers in members.items()
    ]


def _kind(path: str) -> str:
    """A path from its innermost list of blocks (a plural name) on: `transformer_blocks.*.attn1.to_q`."""
    parts = path.split(".")
    lists = [i for i in range(len(parts) - 2) if parts[i].endswith("s") and parts[i + 1].isdecimal()]
    if not lists:
        return path
    return ".".join([parts[lists[-1]], "*", *parts[lists[-1] + 2 :]])


def _layer_name(module: nn.Module) -> str:
    if isinstance(module, CONVOLUTIONS):
        return f"{type(module).__name__} {'×'.join(map(str, module.kernel_size))}"
    return type(module).__name__
