"""Lorasmith: LoRA training for diffusion models.

    import lorasmith as ls

    model = ls.load_model("sd15.safetensors")
    data = ls.load_dataset("photos/", model, trigger="sks dog")
    result = ls.train(model, data, steps=500, rank=16)
    result.lora.save("dog.safetensors")
    result.plot("loss.png")

Names are resolved when they are first used, so that importing the package is quick. docs/python.md has recipes.

    load_model      a base model from a file, a folder, a hub or a loaded diffusers pipeline
    load_dataset    images and captions, from files or from memory, encoded for a model
    encode          one picture and its caption as a sample
    train           a run; settings are those of TrainConfig
    Trainer         the loop of such a run, stepped by hand
    Trainable       a network of one's own to train on
    train_together  several runs over one model, which is held once
    generate        pictures from prompts, with LoRAs
    evaluate        which LoRA of a run is good, by what each draws
    write_card      a folder to share a LoRA with, as the Hugging Face hub expects it
    upload_card     such a folder to the hub
    run_workflow    a ComfyUI workflow, from its file or an example of the package
    Lora            a LoRA in memory: load, apply, save
    TrainConfig, DataConfig, ImageSource     settings of a run and of its data
    register        an algorithm, a family, an optimizer or another thing of your own, by kind and name
    Model, Denoiser, EncodedDataset, Sample, Conditioning, TrainResult, Evaluation, Card   what these take and return
    events          what a run reports to `on_event`
    errors          the exceptions, all of them LorasmithError
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# cuBLAS is deterministic only with a workspace of fixed size, and reads this once, at the first product of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if TYPE_CHECKING:
    from lorasmith.core import errors
    from lorasmith.core.errors import LorasmithError
    from lorasmith.data.data_config import DataConfig, ImageSource
    from lorasmith.data.dataset import EncodedDataset, Sample
    from lorasmith.evaluation.evaluation_record import Evaluation
    from lorasmith.families.conditionings import Conditioning
    from lorasmith.families.loading import load_model
    from lorasmith.families.model import Denoiser, Model
    from lorasmith.nodes.workflow_run import run_workflow
    from lorasmith.runs.extending import register
    from lorasmith.runs.hub_upload import upload_card
    from lorasmith.runs.library import encode, evaluate, generate, load_dataset, train, train_together
    from lorasmith.runs.model_card import Card, write_card
    from lorasmith.runs.trainer import Trainer
    from lorasmith.training import events
    from lorasmith.training.config import TrainConfig
    from lorasmith.training.lora_handle import Lora
    from lorasmith.training.results import TrainResult
    from lorasmith.training.trainable import Trainable

    __version__: str

__all__ = [
    "Card",
    "Conditioning",
    "DataConfig",
    "Denoiser",
    "EncodedDataset",
    "Evaluation",
    "ImageSource",
    "Lora",
    "LorasmithError",
    "Model",
    "Sample",
    "TrainConfig",
    "TrainResult",
    "Trainable",
    "Trainer",
    "__version__",
    "encode",
    "errors",
    "evaluate",
    "events",
    "generate",
    "load_dataset",
    "load_model",
    "register",
    "run_workflow",
    "train",
    "train_together",
    "upload_card",
    "write_card",
]

_HOMES = {
    "Card": "runs.model_card",
    "Conditioning": "families.conditionings",
    "DataConfig": "data.data_config",
    "Denoiser": "families.model",
    "EncodedDataset": "data.dataset",
    "Evaluation": "evaluation.evaluation_record",
    "ImageSource": "data.data_config",
    "Lora": "training.lora_handle",
    "LorasmithError": "core.errors",
    "Model": "families.model",
    "Sample": "data.dataset",
    "TrainConfig": "training.config",
    "TrainResult": "training.results",
    "Trainable": "training.trainable",
    "Trainer": "runs.trainer",
    "encode": "runs.library",
    "evaluate": "runs.library",
    "generate": "runs.library",
    "load_dataset": "runs.library",
    "load_model": "families.loading",
    "register": "runs.extending",
    "run_workflow": "nodes.workflow_run",
    "train": "runs.library",
    "train_together": "runs.library",
    "upload_card": "runs.hub_upload",
    "write_card": "runs.model_card",
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
