"""Choices that several rooms share, without torch, to keep the command line's help fast: literal types of closed ones,
and registries of those to which extensions add, whose functions are elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

from lorasmith.core.registry import Registry

Activations = Literal["keep", "lean", "selective", "host"]
"""How activations are kept until the backward pass; see `training.memory.activations`."""

ActivationPlan = Literal[Activations, "auto"]
"""One of these, or the fastest that fits by measurement."""

AttentionKernel = Literal["torch", "flash", "cudnn", "efficient"]
"""Kernels of attention on NVIDIA GPUs, `torch` for the one that torch chooses; see `training.attention`."""

AttentionChoice = Literal["auto", AttentionKernel]
"""One of these, or the fastest by measurement."""

Fix = Literal["sizes", "rotation", "formats", "copies", "look-alikes"]
"""Problems that a repaired copy of a folder of images can be free of; see `data.mended_folder`."""

WEIGHTINGS: Registry[Any] = Registry(
    "loss weighting",
    group="weightings",
    names=("none", "min_snr", "soft_min_snr", "debiased", "p2", "sigma_sqrt", "cosmap"),
    home="lorasmith.diffusion.losses",
)
"""Weight of a noise level in the loss."""

Objective = Literal["native", "x0"]
"""What the loss compares: the model's native prediction, or the clean sample."""

Quantization = Literal[
    "none",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3_tensor",
    "fp8_e5m2_tensor",
    "int8",
    "int8_convrot",
    "mxfp8",
    "nf4",
    "nvfp4",
]
"""How frozen weights are stored; see `core.quantization`."""

ProductFormat = Literal["training_dtype", "fp8", "int8", "mxfp8", "nvfp4"]
"""Number format of products with frozen weights; see `core.quantized_products`."""

TIMESTEP_DISTRIBUTIONS: Registry[Any] = Registry(
    "timestep distribution",
    group="timesteps",
    names=("uniform", "logit_normal", "sigmoid", "shifted"),
    home="lorasmith.diffusion.schedule",
)
"""Distribution of diffusion time in training."""
