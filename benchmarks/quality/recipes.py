"""Recipes as their documents give them, for Stable Diffusion 1.x where they have one, run in this engine.

Numbers of steps and rates are for models of a billion weights. So all recipes see equally many pictures, and rates are
multiplied by one factor for the built-in model of nine million; `--factors` tries others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.learning import COMFYUI

AVERAGE = "average"  # no setting: the length of the average that is made of a run's averages and measured last
STRENGTH = "strength"  # nor this: strengths, of which each checkpoint is measured at the one that evaluates best


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from ours."""

    source: str
    settings: Mapping[str, Any]
    rate: float | None = None  # of the document; None for ours

    def at(self, factor: float) -> dict[str, Any]:
        """The settings with the rate multiplied."""
        rates = {} if self.rate is None else {"learning_rate": self.rate * factor}
        if "train_text_encoder" in self.settings and self.rate is not None:
            rates["text_encoder_rate"] = self.rate * factor
        return {**self.settings, **rates}


RECIPES: Mapping[str, Recipe] = {
    "lorasmith": Recipe(
        "docs/subjects.md",
        {"train_text_encoder": True, "text_encoder_rate": 7e-4, "timesteps": "shifted", "timestep_shift": 3.0},
    ),
    "comfyui": Recipe(
        "defaults of the node Train LoRA (0.33)",
        {**COMFYUI, "rank": 8},
        COMFYUI["learning_rate"],
    ),
    "diffusers": Recipe(
        "examples/dreambooth/README.md, train_dreambooth_lora.py",
        {"rank": 4, "targets": "attention", "schedule": "constant", "stratified": False},
        1e-4,
    ),
    "lorasmith, plain": Recipe("the defaults of `lorasmith train`", {}),
    "sd-scripts": Recipe(
        "docs/train_network.md",
        {
            "rank": 16,
            "alpha": 1.0,
            "targets": "attention+ff",
            "schedule": "constant",
            "stratified": False,
            "train_text_encoder": True,
        },
        1e-4,
    ),
    "onetrainer": Recipe(
        "training_presets/SD1.5/#sd 1.5 LoRA.json",
        {
            "batch_size": 4,
            "rank": 16,
            "alpha": 1.0,
            "targets": "attention+ff",
            "schedule": "constant",
            "warmup_steps": 8,  # 200 of the thousand that 40 pictures make, in as many as are taken here
            "stratified": False,
            "train_text_encoder": True,
        },
        3e-4,
    ),
    "ai-toolkit": Recipe(
        "config/examples/train_lora_sd35_large_24gb.yaml",
        {
            "rank": 16,
            "targets": "transformer",
            "schedule": "constant",
            "ema_decay": 0.99,
            "stratified": False,
            "timesteps": "uniform",
        },
        1e-4,
    ),
}

METHODS: Sequence[Mapping[str, Any]] = (
    {"tlora": "plain"},
    {"tlora": "orthogonal"},
    {"preserve": "class"},
    {"preserve": "blank"},
    {"weight_change": 0.01},
    {"noise_offset": 0.05},
    {"pyramid_noise": 0.3},
    {"input_perturbation": 0.1},
    {"loss_weighting": "min_snr"},
    {"loss_weighting": "debiased"},
    {"loss_weighting": "p2"},
    {"ema_decay": 0.9},
    {"post_hoc_ema": 8, AVERAGE: 0.1},
    {STRENGTH: (0.7, 0.85, 1.0, 1.15, 1.3)},
)
"""What is added to our recipe, each alone."""

ROUTING: Sequence[Mapping[str, Any]] = ({"tread_rate": 0.25}, {"tread_rate": 0.5})
"""What transformers alone can have."""
