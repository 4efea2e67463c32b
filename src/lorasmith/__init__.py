"""Lorasmith: LoRA training for diffusion models.

    import lorasmith as ls

    model = ls.load_model("sd15.safetensors")
    data = ls.load_dataset("photos/", model, trigger="sks dog")
    result = ls.train(model, data, steps=500, rank=16)
    result.lora.save("dog.safetensors")
    result.plot("loss.png")

Names are resolved when they are first used, so that importing the package is quick. docs/python.md has recipes.

    load_model      a base model from a file, a folder, a hub or a loaded diffusers pipeline
    load_dataset    images and captions, encoded for a model
    train           a run; settings are those of TrainConfig
    train_together  several runs over one model, which is held once
    generate        pictures from prompts, with LoRAs
    run_workflow    a ComfyUI workflow, from its file or an example of the package
    Lora            a LoRA in memory: load, apply, save
    TrainConfig, DataConfig, ImageSource     settings of a run and of its data
    register        an algorithm, a family, an optimizer or another thing of your own, by kind and name
    Model, Denoiser, EncodedDataset, Sample, TrainResult     what these functions take and return
    events          what a run reports to `on_event`
    errors          the exceptions, all of them LorasmithError
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.core import errors
    from lorasmith.core.errors import LorasmithError
    from lorasmith.data.data_config import DataConfig, ImageSource
    from lorasmith.data.dataset import EncodedDataset, Sample
    from lorasmith.families.loading import load_model
    from lorasmith.families.model import Denoiser, Model
    from lorasmith.nodes.workflow_run import run_workflow
    from lorasmith.runs.extending import register
    from lorasmith.runs.library import generate, load_dataset, train, train_together
    from lorasmith.training import events
    from lorasmith.training.config import TrainConfig
    from lorasmith.training.lora_handle import Lora
    from lorasmith.training.results import TrainResult

    __version__: str

__all__ = [
    "DataConfig",
    "Denoiser",
    "EncodedDataset",
    "ImageSource",
    "Lora",
    "LorasmithError",
    "Model",
    "Sample",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "errors",
    "events",
    "generate",
    "load_dataset",
    "load_model",
    "register",
    "run_workflow",
    "train",
    "train_together",
]

_HOMES = {
    "DataConfig": "data.data_config",
    "Denoiser": "families.model",
    "EncodedDataset": "data.dataset",
    "ImageSource": "data.data_config",
    "Lora": "training.lora_handle",
    "LorasmithError": "core.errors",
    "Model": "families.model",
    "Sample": "data.dataset",
    "TrainConfig": "training.config",
    "TrainResult": "training.results",
    "generate": "runs.library",
    "load_dataset": "runs.library",
    "load_model": "families.loading",
    "register": "runs.extending",
    "run_workflow": "nodes.workflow_run",
    "train": "runs.library",
    "train_together": "runs.library",
}
_MODULES = {"errors": "core.errors", "events": "training.events"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lorasmith.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"lorasmith.{_MODULES[name]}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lorasmith")
    raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
