"""comfyui-lorasmith: Lorasmith's trainer as nodes of ComfyUI."""

import importlib.util

if importlib.util.find_spec("lorasmith") is None:
    raise ImportError(
        "comfyui-lorasmith needs the package lorasmith in ComfyUI's Python; install it and restart ComfyUI"
    )

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
