"""What machine, data and job decide about a run, beside the settings, which a person decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorasmith.core import fp8_products
from lorasmith.core.choices import ActivationPlan
from lorasmith.core.dtypes import chosen_dtype
from lorasmith.training.config import ResolvedConfig

__all__ = ["Runtime"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run is carried out on its device; of settings of the same name, what they come to here.

    Attributes:
        device: where it trains.
        dtype: of frozen weights and products.
        first_step: steps of a LoRA that is continued: draws are counted from there, so that it sees new noise and the
            rest of the epoch.
        learning_rates: of the module paths that have another one than the configuration's.
        varying_sizes: whether samples differ in size, so that compiled code must not depend on it.
        micro_batch: images per forward pass; lowered where memory is too small for `batch_size`.
        checkpoint_depth: of activation checkpointing, 0 for none.
        activations: how the rest is kept; `auto` is replaced before the first step.
        memory_budget: bytes on the device that `auto` may plan with, weights included; None for what is free.
        offloading: whether frozen weights wait in host memory.
        quantized_backward: whether products with weights in fp8 are in fp8.
        compile: whether blocks are compiled, unless weights are offloaded.
    """

    device: torch.device
    dtype: torch.dtype
    first_step: int
    learning_rates: Mapping[str, float]
    varying_sizes: bool
    micro_batch: int
    checkpoint_depth: int
    activations: ActivationPlan
    memory_budget: int | None
    offloading: bool
    quantized_backward: bool
    compile: bool

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
        """What settings come to for a model on a device.

        Args:
            config: the settings.
            module: the frozen model.
            device, first_step, learning_rates, varying_sizes: as above.
        """
        on_cpu = device.type == "cpu"
        # torch.compile decides itself what to keep, and the host's memory is the CPU's own.
        is_idle = config.compile or (config.activations == "host" and on_cpu)
        return cls(
            device=device,
            dtype=chosen_dtype(config.training_dtype, module),
            first_step=first_step,
            learning_rates=learning_rates or {},
            varying_sizes=varying_sizes,
            micro_batch=config.batch_size,
            checkpoint_depth=config.checkpoint_depth if config.gradient_checkpointing else 0,
            activations="keep" if is_idle else config.activations,
            memory_budget=None if config.memory_budget is None else int(config.memory_budget * 2**30),
            offloading=config.offloading and not on_cpu,
            quantized_backward=config.quantized_backward and fp8_products.has_fp8_products(device),
            compile=config.compile,
        )
