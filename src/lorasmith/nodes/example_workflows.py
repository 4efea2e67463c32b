"""The example workflows of the package, named `example:<name>` wherever a workflow file is read.

Each is a file in API format (`assets/examples/<name>.json`) and the same graph in the editor's (`.ui.json`).
`tools/example_graphs.py` writes those that are alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import ASSETS, BUILT_IN_BASE, MODEL_EXTENSIONS, Folders
from lorasmith.core.registry import nearest

EXAMPLE_PREFIX = "example:"  # of names of examples, instead of files


@dataclass(frozen=True)
class Example:
    """An example workflow."""

    name: str  # after `example:`
    card: str  # its title in the editor
    title: str  # what the graph trains, in a line
    path: Path  # in API format
    editor_path: Path  # the same graph in the editor's format
    needs: tuple[str, ...]  # names of model files that it loads and the package lacks


def examples() -> list[Example]:
    """Every example, those that need no other files first."""
    return [_example(name) for name in _TITLES]


def example_named(name: str) -> Example:
    """The example `name`. Raises GraphError if there is none."""
    if name not in _TITLES:
        raise GraphError(
            f"no example {name!r}{nearest(name, _TITLES)}; give {EXAMPLE_PREFIX} and one of {', '.join(_TITLES)}"
        )
    return _example(name)


def _example(name: str) -> Example:
    path = _FOLDER / f"{name}.json"
    values = [value for member in json.loads(path.read_text("utf-8")).values() for value in member["inputs"].values()]
    files = [value for value in values if isinstance(value, str) and value.endswith(MODEL_EXTENSIONS)]
    needs = tuple(file for file in files if file not in Folders(BUILT_IN_BASE).files("checkpoints"))
    return Example(name, *_TITLES[name], path, _FOLDER / f"{name}.ui.json", needs)


_FOLDER = ASSETS / "examples"
_ON_A_FOLDER = " on a folder of images and texts"
_ON_PAIRS = " on pairs of pictures, before and after an edit"
_TITLES = {
    "single_subject": ("Single subject", "a subject from six pictures, as in ComfyUI's training guide"),
    "style": ("Style", "a drawing style from sixteen pictures, shown at three strengths"),
    "folder": ("Folder of any sizes", "a folder of images of any sizes, in buckets"),
    "continue": ("Continue a LoRA", "a LoRA further, from a saved file that Train LoRA names as existing_lora"),
    "strengths": ("Compare strengths", "a subject, and draws it at four strengths of the LoRA"),
    "preserve": ("Keep the class", "a subject, and keeps what the model draws for its class"),
    "text_encoder": ("Text encoder", "a subject in model and text encoder"),
    "sd15": ("Stable Diffusion 1.5", "Stable Diffusion 1.5" + _ON_A_FOLDER),
    "sdxl": ("Stable Diffusion XL", "Stable Diffusion XL" + _ON_A_FOLDER),
    "flux1": ("Flux.1", "Flux.1 dev" + _ON_A_FOLDER),
    "flux1_kontext_pairs": ("Flux.1 Kontext, pairs", "Flux.1 Kontext" + _ON_PAIRS),
    "flux2_klein": ("Flux.2 klein", "Flux.2 klein" + _ON_A_FOLDER),
    "flux2_klein_pairs": ("Flux.2 klein, pairs", "Flux.2 klein" + _ON_PAIRS),
    "z_image": ("Z-Image", "Z-Image" + _ON_A_FOLDER),
    "ernie_image": ("ERNIE-Image", "ERNIE-Image" + _ON_A_FOLDER),
    "sd35": ("Stable Diffusion 3.5", "Stable Diffusion 3.5 medium" + _ON_A_FOLDER),
    "lumina2": ("Lumina 2", "Lumina 2" + _ON_A_FOLDER),
    "chroma": ("Chroma", "Chroma" + _ON_A_FOLDER),
    "qwen_image": ("Qwen-Image", "Qwen-Image" + _ON_A_FOLDER),
    "qwen_image_edit_pairs": ("Qwen-Image-Edit, pairs", "Qwen-Image-Edit 2511" + _ON_PAIRS),
    "qwen_image21": ("Qwen-Image 2.1", "Qwen-Image 2.1" + _ON_A_FOLDER),
    "qwen_image21_pairs": ("Qwen-Image 2.1, pairs", "Qwen-Image 2.1" + _ON_PAIRS),
    "ideogram4": ("Ideogram 4", "Ideogram 4" + _ON_A_FOLDER),
    "krea2": ("Krea 2", "Krea 2" + _ON_A_FOLDER),
    "anima": ("Anima", "Anima" + _ON_A_FOLDER),
    "wan": ("Wan 2.1", "Wan 2.1" + _ON_A_FOLDER),
    "wan22_5b": ("Wan 2.2 5B", "Wan 2.2 5B" + _ON_A_FOLDER),
    "hunyuan_video15": ("HunyuanVideo 1.5", "HunyuanVideo 1.5" + _ON_A_FOLDER),
}
"""Title in the editor, and what the graph trains."""
