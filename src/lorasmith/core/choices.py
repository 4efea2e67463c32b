"""The values that settings choose among, as types.

`TrainConfig` annotates its settings with them, `option` reads the choices from the annotation, and the tables that hold
what a choice does have an entry for each. Without torch, so that the help of the command line costs nothing. Choices
that grow by registering something (algorithms, optimizers, schedules) are read from their registries instead.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "ActivationPlan",
    "Activations",
    "DoraAxis",
    "LoraDtype",
    "LossFunction",
    "LossWeighting",
    "NormsAndBiases",
    "Objective",
    "Quantization",
    "TimestepDistribution",
    "TrackerName",
    "TrainingDtype",
    "ZeroInit",
]

Activations = Literal["keep", "lean", "selective", "host"]
"""How activations are kept until the backward pass; see `training.memory.activations`."""

ActivationPlan = Literal[Activations, "auto"]
"""One of these, or the fastest that fits, by measurement."""

DoraAxis = Literal["none", "input", "output"]
"""What a DoRA has one magnitude for."""

LoraDtype = Literal["bf16", "fp32"]
"""Number format of a saved LoRA."""

LossFunction = Literal["MSE", "L1", "Huber", "SmoothL1"]
"""Distance between prediction and target; see `diffusion.losses`."""

LossWeighting = Literal["none", "min_snr", "soft_min_snr"]
"""Weight of a noise level in the loss; see `diffusion.weightings`."""

NormsAndBiases = Literal["none", "norms", "biases", "norms+biases"]
"""Which differences of norms and biases are trained."""

Objective = Literal["native", "x0"]
"""What the loss compares: what the model predicts, or the clean sample."""

Quantization = Literal["none", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_tensor", "fp8_e5m2_tensor", "int8", "nf4"]
"""How frozen weights are stored; see `core.quantization`."""

TimestepDistribution = Literal["uniform", "logit_normal", "sigmoid", "shifted"]
"""Distribution of diffusion time in training; see `diffusion.timesteps`."""

TrackerName = Literal["none", "tensorboard", "wandb"]
"""Where the numbers of a run are sent."""

TrainingDtype = Literal["auto", "bf16", "fp32", "none"]
"""Number format of frozen weights and products; `none` is the loaded model's own."""

ZeroInit = Literal["up", "down"]
"""Which matrix of a LoRA starts at zero."""
