"""The list of modules that declare nodes."""

from __future__ import annotations

from importlib import import_module

from lorasmith.core.registry import Registry
from lorasmith.workflow import NODES, Node

_MODULES = (
    "conditioning",
    "custom_sampling",
    "datasets",
    "extraction",
    "image_sets",
    "images",
    "latents",
    "loaders",
    "lora_loaders",
    "model_sampling",
    "outputs",
    "patterns",
    "primitives",
    "sampling",
    "saved_datasets",
    "strings",
    "text_sets",
    "text_encoding",
    "training",
    "videos",
)


def load_nodes() -> Registry[Node]:
    """Register all nodes. The modules are imported here, as they import torch and the model code."""
    for name in _MODULES:
        import_module(f"lorasmith.nodes.{name}")
    return NODES
