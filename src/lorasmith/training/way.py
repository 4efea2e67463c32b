"""How a step is computed, as one value: made from settings and device, completed by measurement, kept in run states.

What a step learns depends on it only through rounding. `planning` chooses what the settings leave open before the first
step, and `recovery` takes a smaller one where memory runs out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasmith.core import quantized_products
from lorasmith.core.choices import ActivationPlan, AttentionChoice, ProductFormat
from lorasmith.core.placement import chosen_dtype, dtype_name, fp32_products, idle_gpu, multiplies
from lorasmith.core.processes import ALONE, Processes, current
from lorasmith.training.config import DtypeSetting, ResolvedConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Way:
    """How steps are computed; fields named like settings hold their effective value."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    varying_sizes: bool  # of samples, so that compiled code must not depend on them
    micro_batch: int  # images per forward pass; lowered if memory is too small for `batch_size`
    checkpoint_depth: int  # of activation checkpointing, 0 for none
    kept_blocks: int  # number of the last blocks at that depth that are not recomputed
    activations: ActivationPlan  # how the others are kept; `auto` is measured
    memory_budget: int | None  # device memory in bytes, weights included; None for all free memory
    memory_cap: int | None  # bytes of GPU memory beyond which allocations fail; None for no cap
    offloading: bool
    offloading_share: float | None  # of the blocks; None is measured
    sharding: bool
    products: ProductFormat  # with frozen weights whose codes and sizes fit
    compile: bool
    compile_failed: bool = False  # so that `compile` is off
    attention: AttentionChoice  # `auto` is measured
    cuda_graphs: bool
    autotune: bool  # until the fastest of several is chosen
    processes: Processes = ALONE
    memory_share: float = 1.0  # part of the free memory that `auto` may use

    @classmethod
    def of(cls, config: ResolvedConfig, module: nn.Module, device: torch.device, *, varying_sizes: bool = False) -> Way:
        on_cpu = device.type == "cpu"
        # torch.compile selects the kept activations itself, and host memory is the CPU's own.
        is_idle = config.compile or (config.activations == "host" and on_cpu)
        return cls(
            device=device,
            dtype=chosen_dtype(config.training_dtype, module),
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
            autotune=_is_tuned(config, device) and not config.deterministic and current().size == 1,
            processes=current(),
            sharding=config.sharding and current().size > 1,
        )

    @property
    def is_open(self) -> bool:
        """Whether something is left to be measured, besides what `autotune` compares."""
        return self.attention == "auto" or self.activations == "auto" or self.is_share_open

    @property
    def is_share_open(self) -> bool:
        """Whether the share of offloaded blocks is left to be measured."""
        return self.offloading and self.offloading_share is None

    @property
    def settled(self) -> Way:
        """With torch's own attention and all blocks offloaded where that is open."""
        attention: AttentionChoice = "torch" if self.attention == "auto" else self.attention
        share = 1.0 if self.is_share_open else self.offloading_share
        return replace(self, attention=attention, offloading_share=share)

    def smaller(self, config: ResolvedConfig) -> tuple[Way, str] | None:
        """The next one to try where memory runs out, and how it repeats a step, in words; None at the end."""
        if self.offloading and self.offloading_share != 1 and config.offloading_share is None:
            return replace(self, offloading_share=1.0), "with all blocks offloaded"
        if self.cuda_graphs:
            return replace(self, cuda_graphs=False), "without CUDA graphs"
        if self.kept_blocks > 1:
            return replace(self, kept_blocks=1), "with all blocks recomputed"
        if self.micro_batch > 1:
            found = replace(self, micro_batch=-(-self.micro_batch // 2))
        elif self.checkpoint_depth != 1:  # whole blocks need the least memory
            found = replace(self, checkpoint_depth=1)
        else:
            return None
        also = ", with activation checkpointing" if found.checkpoint_depth else ""
        return found, f"with the same images, {found.micro_batch} at a time{also}"

    @property
    def uncompiled(self) -> Way:
        return replace(self, compile=False, compile_failed=True)

    def __str__(self) -> str:
        kept: str = self.activations
        if self.checkpoint_depth:
            kept = f"{recomputed_blocks(self.kept_blocks)} recomputed at depth {self.checkpoint_depth}"
        products = "" if self.products == "training_dtype" else f"products in {self.products}"
        how = "compiled" if self.compile else "CUDA graphs" if self.cuda_graphs else ""
        return ", ".join(filter(None, (kept, products, how)))

    def to_state(self, config: ResolvedConfig) -> dict[str, Any]:
        """What a run state keeps, as JSON values; `WayState` reads it."""
        is_tuned = _is_tuned(config, self.device) and not self.autotune
        return {
            "micro_batch": self.micro_batch,
            "checkpoint_depth": self.checkpoint_depth,
            "attention": self.attention,
            "compile_failed": self.compile_failed,
            "tuned": {name: getattr(self, name) for name in ("activations", "products", "compile", "cuda_graphs")}
            if is_tuned
            else None,
        }

    def resumed(self, state: WayState) -> Way:
        """With what a run state kept, where the settings leave it open."""
        changes: dict[str, Any] = {"micro_batch": state.micro_batch}
        if self.activations != "auto":  # which is measured again; the numbers do not depend on it
            changes["checkpoint_depth"] = state.checkpoint_depth
        if self.attention == "auto":
            changes["attention"] = state.attention
        if self.autotune and (tuned := state.tuned) is not None:
            changes |= {"autotune": False, "products": tuned.products, "compile": tuned.compile}
            changes["cuda_graphs"] = bool(tuned.cuda_graphs)
            if tuned.compile:
                changes["activations"] = tuned.activations
        found = replace(self, **changes)
        return found.uncompiled if state.compile_failed else found


@dataclass(frozen=True, kw_only=True)
class TunedState:
    """What `autotune` chose."""

    activations: ActivationPlan
    products: ProductFormat
    compile: bool
    cuda_graphs: bool | None = None  # of an earlier version, which did not try them


@dataclass(frozen=True, kw_only=True)
class WayState:
    """A way in a run state. Raises ValueError if a number is out of range."""

    micro_batch: int
    checkpoint_depth: int
    attention: AttentionChoice
    compile_failed: bool
    tuned: TunedState | None

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.checkpoint_depth < 0:
            raise ValueError("micro_batch or checkpoint_depth are out of range")


def state_of_earlier(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A run state's numbers with its way in one entry; earlier versions had five."""
    if "micro_batch" not in numbers:
        return dict(numbers)
    names = ("micro_batch", "checkpoint_depth", "eager", "attention", "way")
    micro_batch, depth, eager, attention, tuned = (numbers.get(name) for name in names)
    if isinstance(tuned, Mapping):
        tuned = {name: tuned.get(name) for name in ("activations", "products", "compile")}
    found = {"micro_batch": micro_batch, "checkpoint_depth": depth, "compile_failed": eager, "tuned": tuned}
    kept = {name: value for name, value in numbers.items() if name not in names}
    return {**kept, "way": {**found, "attention": "torch" if attention is None else attention}}


def recomputed_blocks(kept: int) -> str:
    """Which blocks are recomputed, in words."""
    return f"blocks but the last {kept}" if kept > 1 else "blocks"


def dtype_on_device(config: TrainConfig, module: nn.Module, device: torch.device) -> DtypeSetting:
    """`training_dtype` on a device: fp32 if the device would emulate the format that is set."""
    if config.training_dtype == "auto":
        return "bf16" if multiplies(torch.bfloat16, device) else "fp32"
    is_kept = config.exact_dtype or multiplies(chosen_dtype(config.training_dtype, module), device)
    return config.training_dtype if is_kept else "fp32"


def products_on_device(config: TrainConfig, device: torch.device) -> ProductFormat:
    """`products` on a device: training_dtype if it has none in the format that is set, or slow ones."""
    kind = config.products
    if kind == "training_dtype" or not quantized_products.has_products(kind, device):
        return "training_dtype"
    is_slow = quantized_products.PRODUCT_KINDS[kind].needs_compiler(device) and not config.compile
    return "training_dtype" if is_slow else kind


def notes_on_device(config: TrainConfig, module: nn.Module, device: torch.device) -> Iterator[str]:
    """Notes on settings with little or no effect on a device, and on a GPU that is not used."""
    if device.type == "cpu" and (why := idle_gpu()):
        yield f"{why[0].upper()}{why[1:]}: steps are computed on the CPU; lorasmith doctor --install mends it."
    if config.training_dtype != "auto" and not multiplies(asked := chosen_dtype(config.training_dtype, module), device):
        name = dtype_name(asked)
        if config.exact_dtype:
            yield f"This device has no units for {name} products and emulates them, slowly, as exact_dtype is on."
        else:
            yield (
                f"This device has no units for {name} products, so that they are in fp32, which is faster; weights "
                "stay as stored. Turn exact_dtype on to emulate them."
            )
    if device.type == "cuda" and dtype_on_device(config, module, device) == "fp32" and fp32_products() != "highest":
        yield (
            "Products of this fp32 run are TF32's (10 bits after the point), as torch's float32_matmul_precision is "
            f"{fp32_products()} here; unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, or set NVIDIA_TF32_OVERRIDE=0, for fp32."
        )
    if config.activations == "host" and device.type == "cpu":
        yield "activations host has no effect on the CPU, whose memory is the host's; use lean or selective."
    if config.memory_cap is not None and device.type == "cpu":
        yield f"memory_cap {config.memory_cap:g} has no effect on the CPU; memory_budget bounds activations auto there."
    if config.attention not in ("auto", "torch") and device.type == "cpu":
        yield f"attention {config.attention} has no effect on the CPU, which has one kernel."
    if config.offloading and device.type == "cpu":
        yield "offloading has no effect on the CPU, whose memory is the host's; use quantization to save memory."
    elif config.offloading and config.compile and not config.gradient_checkpointing:
        yield "Offloaded blocks are recomputed in the backward pass, as compile is on; see gradient_checkpointing."
    if config.sharding and current().size == 1:
        yield "sharding has no effect in one process, which keeps all weights; start several, with --gpus or torchrun."
    if config.autotune and (config.deterministic or current().size > 1):
        why = "deterministic is on" if config.deterministic else "several processes must do the same"
        yield f"autotune has no effect, as {why}."
    if config.cuda_graphs and device.type != "cuda":
        yield "cuda_graphs has no effect here, as they are of GPUs; leave it out."
    elif config.cuda_graphs and current().size > 1:
        yield "cuda_graphs has no effect in several processes, which exchange gradients during the backward pass."


def _is_tuned(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps are timed in several ways, if the run is long enough."""
    if config.autotune is not None:
        return config.autotune
    return device.type == "cuda" and not config.compile and not config.cuda_graphs


def _attention(config: ResolvedConfig, device: torch.device) -> AttentionChoice:
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch"
    return "torch" if config.attention == "auto" and config.deterministic else config.attention


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)
