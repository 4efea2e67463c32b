"""comfyui-lorasmith: Lorasmith's trainer as nodes of ComfyUI."""

import importlib.util

if importlib.util.find_spec("lorasmith") is None:
    raise ImportError("comfyui-lorasmith needs the trainer itself in ComfyUI's Python: pip install lorasmith")

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
