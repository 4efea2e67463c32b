"""Recipes as their documents give them, for Stable Diffusion 1.x where they have one, run in this engine.

Numbers of steps and rates are for models of a billion weights. So all recipes see equally many pictures, and rates are
multiplied by one factor for the built-in model of five million; `--factors` tries others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.learning import COMFYUI


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from ours."""

    source: str
    settings: Mapping[str, Any]
    rate: float | None = None  # of the document; None for ours

    def at(self, factor: float) -> dict[str, Any]:
        """The settings with the rate multiplied."""
        rates = {} if self.rate is None else {"learning_rate": self.rate * factor}
        return {**self.settings, **rates}


RECIPES: Mapping[str, Recipe] = {
    "lorasmith": Recipe("the defaults of `lorasmith train`", {"batch_size": 4}),
    "comfyui": Recipe(
        "defaults of the node Train LoRA (0.33)",
        {**COMFYUI, "batch_size": 1, "rank": 8},
        COMFYUI["learning_rate"],
    ),
    "diffusers": Recipe(
        "examples/dreambooth/README.md, train_dreambooth_lora.py",
        {"batch_size": 1, "rank": 4, "targets": "attention", "schedule": "constant", "stratified": False},
        1e-4,
    ),
    "sd-scripts": Recipe(
        "docs/train_network.md",
        {
            "batch_size": 1,
            "rank": 16,
            "alpha": 1.0,
            "targets": "attention+ff",
            "schedule": "constant",
            "stratified": False,
            "train_text_encoder": True,
            "text_encoder_rate": 1e-4,
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
            "warmup_steps": 200,
            "stratified": False,
            "train_text_encoder": True,
            "text_encoder_rate": 3e-4,
        },
        3e-4,
    ),
    "ai-toolkit": Recipe(
        "config/examples/train_lora_sd35_large_24gb.yaml",
        {
            "batch_size": 1,
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
