"""comfyui-lorasmith: Lorasmith's trainer as nodes of ComfyUI."""

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

if importlib.util.find_spec("lorasmith") is None:
    raise ImportError(
        "comfyui-lorasmith needs the package lorasmith in ComfyUI's Python; install it and restart ComfyUI"
    )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


_declared = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))
_needed = _declared["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
_found = getattr(importlib.import_module("comfyui_version"), "__version__", "")
if _numbers(_found) < _numbers(_needed):
    raise ImportError(f"comfyui-lorasmith needs ComfyUI {_needed} or later, and this is {_found}; update ComfyUI")

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402 - only then

WEB_DIRECTORY = "./web"
"""Has the help pages of the nodes, `docs/NODE.md` and `docs/NODE/zh.md`, which `proof/help_pages.py` writes."""

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
