"""The example workflows of the package, which `example:<name>` stands for wherever a workflow file is read.

Each is a file in API format (`assets/examples/<name>.json`) and the same graph as the editor keeps it (`.ui.json`).
`tools/example_graphs.py` writes those that are alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import ASSETS, MODEL_EXTENSIONS, Folders
from lorasmith.core.registry import nearest

__all__ = ["EXAMPLE_PREFIX", "Example", "example_named", "examples"]

EXAMPLE_PREFIX = "example:"
"""Start of what names an example instead of a file."""


@dataclass(frozen=True)
class Example:
    """An example workflow.

    Attributes:
        name: what follows `example:`.
        title: what the graph trains, in a line.
        path: the file in API format.
        editor_path: the same graph in the editor's format.
        needs: names of the model files that it loads and the package does not have.
    """

    name: str
    title: str
    path: Path
    editor_path: Path
    needs: tuple[str, ...]


def examples() -> list[Example]:
    """Every example, those that need no other file first."""
    return [_example(name, title) for name, title in _TITLES.items()]


def example_named(name: str) -> Example:
    """The example `name`.

    Raises:
        GraphError: there is none.
    """
    if name not in _TITLES:
        raise GraphError(
            f"no example {name!r}{nearest(name, _TITLES)}; give {EXAMPLE_PREFIX} and one of {', '.join(_TITLES)}"
        )
    return _example(name, _TITLES[name])


def _example(name: str, title: str) -> Example:
    path = _FOLDER / f"{name}.json"
    values = [value for member in json.loads(path.read_text("utf-8")).values() for value in member["inputs"].values()]
    files = [value for value in values if isinstance(value, str) and value.endswith(MODEL_EXTENSIONS)]
    needs = tuple(file for file in files if file not in Folders(ASSETS).files("checkpoints"))
    return Example(name, title, path, _FOLDER / f"{name}.ui.json", needs)


_FOLDER = ASSETS / "examples"
_TITLES = {
    "single_subject": "a subject from six pictures, as in ComfyUI's training guide",
    "style": "a drawing style from sixteen pictures, shown at three strengths",
    "folder": "a folder of images of any sizes, in buckets",
    "continue": "a LoRA further, from a saved file that Train LoRA names as existing_lora",
    "strengths": "a subject, and draws it at four strengths of the LoRA",
    "sd15": "Stable Diffusion 1.5 on a folder of images and texts",
    "sdxl": "Stable Diffusion XL on a folder of images and texts",
    "flux1": "Flux.1 dev on a folder of images and texts",
    "flux2_klein": "Flux.2 klein on a folder of images and texts",
    "z_image": "Z-Image on a folder of images and texts",
    "ernie_image": "ERNIE-Image on a folder of images and texts",
    "sd35": "Stable Diffusion 3.5 medium on a folder of images and texts",
    "lumina2": "Lumina 2 on a folder of images and texts",
    "chroma": "Chroma on a folder of images and texts",
    "qwen_image": "Qwen-Image on a folder of images and texts",
    "krea2": "Krea 2 on a folder of images and texts",
    "anima": "Anima on a folder of images and texts",
    "wan": "Wan 2.1 on a folder of images and texts",
    "wan22_5b": "Wan 2.2 5B on a folder of images and texts",
}
