"""The settings of a run that depend on device, data and job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorasmith.core import quantized_products
from lorasmith.core.choices import ActivationPlan, AttentionChoice, ProductFormat
from lorasmith.core.placement import chosen_dtype, multiplies
from lorasmith.core.processes import ALONE, Processes, current
from lorasmith.training.config import DtypeSetting, ResolvedConfig, TrainConfig


def dtype_on_device(config: TrainConfig, module: nn.Module, device: torch.device) -> DtypeSetting:
    """`training_dtype` on a device: fp32 if the device would emulate the format that is set."""
    if config.training_dtype == "auto":
        return "bf16" if multiplies(torch.bfloat16, device) else "fp32"
    is_kept = config.exact_dtype or multiplies(chosen_dtype(config.training_dtype, module), device)
    return config.training_dtype if is_kept else "fp32"


def products_on_device(config: TrainConfig, device: torch.device) -> ProductFormat:
    """`products` on a device: training_dtype if it has none in the format that is set."""
    return config.products if quantized_products.has_products(config.products, device) else "training_dtype"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run executes on its device; fields named like settings hold their effective value."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    # Steps of a continued LoRA: draws start there, so that it gets new noise and the rest of the epoch.
    first_step: int
    learning_rates: Mapping[str, float]  # by module path, where not the configuration's
    varying_sizes: bool  # of samples, so that compiled code must not depend on them
    micro_batch: int  # images per forward pass; lowered if memory is too small for `batch_size`
    checkpoint_depth: int  # of activation checkpointing, 0 for none
    kept_blocks: int  # number of the last blocks at that depth that are not recomputed
    activations: ActivationPlan  # how the others are kept; `auto` is resolved before the first step
    memory_budget: int | None  # device memory in bytes, weights included; None for all free memory
    memory_cap: int | None  # bytes of GPU memory beyond which allocations fail; None for no cap
    offloading: bool
    offloading_share: float | None  # of the blocks; None is resolved before the first step
    sharding: bool
    products: ProductFormat  # with frozen weights whose codes and sizes fit
    compile: bool
    attention: AttentionChoice  # `auto` is resolved before the first step
    cuda_graphs: bool
    autotune: bool  # until the way of steps is chosen
    processes: Processes = ALONE
    memory_share: float = 1.0  # part of the free memory that `auto` may use

    @classmethod
    def of(
        cls,
        config: ResolvedConfig,
        module: nn.Module,
        device: torch.device,
        *,
        first_step: int = 0,
        learning_rates: Mapping[str, float] | None = None,
        varying_sizes: bool = False,
    ) -> Runtime:
        on_cpu = device.type == "cpu"
        # torch.compile selects the kept activations itself, and host memory is the CPU's own.
        is_idle = config.compile or (config.activations == "host" and on_cpu)
        return cls(
            device=device,
            dtype=chosen_dtype(config.training_dtype, module),
            first_step=first_step,
            learning_rates=learning_rates or {},
            varying_sizes=varying_sizes,
            micro_batch=config.batch_size,
            checkpoint_depth=config.checkpoint_depth if config.gradient_checkpointing else 0,
            kept_blocks=1,
            activations="keep" if is_idle else config.activations,
            memory_budget=_bytes(config.memory_budget),
            memory_cap=None if on_cpu else _bytes(config.memory_cap),
            offloading=config.offloading and not on_cpu,
            offloading_share=config.offloading_share,
            products=config.products,
            compile=config.compile,
            attention=_attention(config, device),
            cuda_graphs=config.cuda_graphs and device.type == "cuda" and current().size == 1,
            autotune=config.autotune and not config.deterministic and current().size == 1,
            processes=current(),
            sharding=config.sharding and current().size > 1,
        )


def _attention(config: ResolvedConfig, device: torch.device) -> AttentionChoice:
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch"
    return "torch" if config.attention == "auto" and config.deterministic else config.attention


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)
