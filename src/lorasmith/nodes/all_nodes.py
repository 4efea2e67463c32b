"""The list of modules that declare nodes."""

from __future__ import annotations

from importlib import import_module

from lorasmith.core.registry import Registry
from lorasmith.workflow import NODES, Node

_MODULES = (
    *("conditioning", "images", "latents", "loaders", "image_to_video", "picture_prompts"),
    *("outputs", "datasets", "sampling", "strings", "training"),
)


def load_nodes() -> Registry[Node]:
    """Register all built-in nodes. The modules are imported here, as they import torch and the model code."""
    for name in _MODULES:
        import_module(f"lorasmith.nodes.{name}")
    return NODES
