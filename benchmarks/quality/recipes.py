"""Recipes as their documents give them, for Stable Diffusion 1.x where they have one, run in this engine.

Numbers of steps and rates are for models of a billion weights. So all recipes see equally many pictures, and the rates
of each are multiplied by the factor of its `FACTORS` that is best on the development subjects (`frozen.json`).
What our defaults decide is written out, so that the recipes of others do not change with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.learning import COMFYUI

_WRITTEN_OUT = {
    "optimizer": "AdamW",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lora_dtype": "bf16",
    "zero_init": "up",
    "schedule": "constant",
    "timesteps": "uniform",
    "stratified": False,
}


@dataclass(frozen=True)
class Recipe:
    """Settings that differ from ours."""

    source: str
    settings: Mapping[str, Any]
    rates: Mapping[str, float]  # learning rates of the document, by setting
    factors: Sequence[float] = (2.5, 5, 10, 20, 40)  # of the rates that are tried
    transformer: Mapping[str, Any] = field(default_factory=dict)  # what differs on the drawing transformer

    def at(self, factor: float, *, is_transformer: bool = False) -> dict[str, Any]:
        """The settings with the rates multiplied."""
        rates = {name: float(f"{rate * factor:.6g}") for name, rate in self.rates.items()}
        return {**self.settings, **rates, **(self.transformer if is_transformer else {})}

    @property
    def is_constant(self) -> bool:
        """Whether a shorter run is the beginning of a longer one."""
        return self.settings["schedule"] == "constant"


# Recipes for transformers leave text encoders alone, and follow Esser et al. 2024 (arXiv:2403.03206).
_NO_TEXT = {"train_text_encoder": False, "text_encoder_rate": None}
_OF_TRANSFORMERS = {**_NO_TEXT, "targets": "transformer", "timesteps": "logit_normal"}
_RATE_OF_BOTH = {"learning_rate": 1e-4, "text_encoder_rate": 1e-4}

RECIPES: Mapping[str, Recipe] = {
    "lorasmith": Recipe(
        "docs/subjects.md",
        {"train_text_encoder": True, "schedule": "linear"},
        {"learning_rate": 1.4e-4, "text_encoder_rate": 7e-5},
        transformer=_NO_TEXT,
    ),
    "comfyui": Recipe(
        "defaults of the node Train LoRA (0.33)",
        {**_WRITTEN_OUT, **COMFYUI, "rank": 8},
        {"learning_rate": COMFYUI["learning_rate"]},
    ),
    "diffusers": Recipe(
        "examples/dreambooth/README.md, train_dreambooth_lora.py",
        {**_WRITTEN_OUT, "rank": 4, "targets": "attention"},
        {"learning_rate": 1e-4},
        factors=(10, 20, 40, 80, 160),
        transformer={"timesteps": "logit_normal"},
    ),
    "lorasmith, plain": Recipe("the defaults of `lorasmith train`", {"schedule": "linear"}, {"learning_rate": 1.4e-4}),
    "sd-scripts": Recipe(
        "docs/train_network.md",
        {**_WRITTEN_OUT, "rank": 16, "alpha": 1.0, "targets": "attention+ff", "train_text_encoder": True},
        _RATE_OF_BOTH,
        factors=(10, 20, 40, 80, 160),
        transformer=_OF_TRANSFORMERS,
    ),
    "onetrainer": Recipe(
        "training_presets/SD1.5/#sd 1.5 LoRA.json",
        {
            **_WRITTEN_OUT,
            "batch_size": 4,
            "rank": 16,
            "alpha": 1.0,
            "targets": "attention+ff",
            "warmup_steps": 8,  # 200 of the thousand that 40 pictures make, in as many as are taken here
            "train_text_encoder": True,
        },
        {name: 3 * rate for name, rate in _RATE_OF_BOTH.items()},
        factors=(10, 20, 40, 80, 160),
        transformer=_OF_TRANSFORMERS,
    ),
    "ai-toolkit": Recipe(
        "config/examples/train_lora_sd35_large_24gb.yaml",
        {
            **_WRITTEN_OUT,
            "rank": 16,
            "targets": "transformer",
            "ema_decay": 0.99,
        },
        {"learning_rate": 1e-4},
    ),
}
OURS = "lorasmith"
PEERS = tuple(one for one in RECIPES if not one.startswith(OURS))
