"""Lorasmith: LoRA training for diffusion models.

    import lorasmith as ls

    model = ls.load_model("sd15.safetensors")
    data = ls.load_dataset("photos/", model, trigger="sks dog")
    result = ls.train(model, data, steps=500, rank=16)
    result.lora.save("dog.safetensors")
    result.plot("loss.png")

Names are resolved when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.app.model_run import train
    from lorasmith.core.errors import LorasmithError
    from lorasmith.data.encoding import load_dataset
    from lorasmith.families.loading import load_model
    from lorasmith.sampling.generate import generate
    from lorasmith.training.lora_handle import Lora

__all__ = ["Lora", "LorasmithError", "generate", "load_dataset", "load_model", "train"]

_HOMES = {
    "Lora": "training.lora_handle",
    "LorasmithError": "core.errors",
    "generate": "sampling.generate",
    "load_dataset": "data.encoding",
    "load_model": "families.loading",
    "train": "app.model_run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorasmith.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
