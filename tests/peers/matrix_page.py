"""The page that shows the load matrix, drawn from the recorded numbers."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from lora_cases import CASES

__all__ = ["AGREEMENT", "PAGE", "RECORD", "page", "write"]

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "golden" / "load_matrix.json"
PAGE = ROOT / "docs" / "load-matrix.md"
AGREEMENT = 1e-3
"""Relative difference up to which two answers are the same."""

_FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sdxl": "Stable Diffusion XL",
    "flux1": "Flux.1",
    "z-image": "Z-Image",
    "flux2-klein": "Flux.2 klein",
    "krea2": "Krea 2",
    "ernie-image": "ERNIE-Image",
    "anima": "Anima",
    "sd3": "Stable Diffusion 3.5",
    "lumina2": "Lumina 2",
    "qwen-image": "Qwen-Image",
    "chroma": "Chroma",
    "wan": "Wan",
    "wan22-5b": "Wan 2.2 5B",
}
_LOADERS = ("ours", "ComfyUI", "diffusers", "sd-scripts", "LyCORIS", "PEFT")
_LAYOUTS = ("portable", "kohya", "comfy", "ai-toolkit", "diffusers", "peft")

_INTRODUCTION = """\
# Which program applies what

Every kind of LoRA that Lorasmith writes, in every layout, loaded by each program with its own code into the same random
model, and measured. A cell is `applied / modules`: how many of the modules that the program finds in the file (or, for
diffusers, PEFT and our own loader, in the model) it applied. The answer of the denoiser is then compared with ours;
where the two differ by more than a thousandth, the cell says by how much.

- **portable** is what Lorasmith writes when nothing is said.
- *not written*: the layout cannot hold this kind, and saving is refused.
- *refused*: the program raises an error and applies nothing.
- A dash: the program has no way to open this layout, or no model of the family. PEFT reads its own folders alone.
- sd-scripts is its own network (`networks.lora`, `lora_flux`, `lora_sd3`, `lora_lumina`, `lora_anima`); it loads the
  other algorithms with LyCORIS.
- ai-toolkit: original names after `diffusion_model.`, and diffusers' names for Z-Image.
- Flux and Chroma: fused layers (q, k, v) count as one in kohya's and ComfyUI's names. diffusers reads kohya's names of
  them, and ComfyUI's of Lumina 2, at the real width alone and is measured there, on one block of each kind.
- The newer transformers are measured on small models of narrow widths, which ComfyUI is made to accept. Their fused
  layers count as one as well. Of these, sd-scripts has Stable Diffusion 3.5, Anima, Lumina 2 and Chroma alone; its
  sister project musubi-tuner was not measured.

`lorasmith check` and `lorasmith convert` warn of what is below the full count here.
"""


def write(record: dict[str, Any]) -> None:
    """Keep the record, and draw the page from it."""
    order = {(family, case): place for place, (family, case) in enumerate((f, c) for f in _FAMILIES for c in CASES)}
    record["cells"].sort(key=lambda cell: order[cell["family"], cell["case"]])
    lines = ",\n".join(json.dumps(cell, sort_keys=True) for cell in record["cells"])
    versions = json.dumps(record["versions"], sort_keys=True)
    RECORD.write_text(f'{{"versions": {versions},\n"cells": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def page(record: dict[str, Any]) -> str:
    """The page in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = [_INTRODUCTION, *textwrap.wrap(f"Measured with {versions} by `tests/peers/load_matrix.py`.", 120), ""]
    for family, title in _FAMILIES.items():
        text.append(f"## {title}\n")
        for case, kind in CASES.items():
            cells = {
                (cell["layout"], cell["loader"]): cell
                for cell in record["cells"]
                if (cell["family"], cell["case"]) == (family, case)
            }
            if cells:
                text.append(_table(kind.title, cells))
    return "\n".join(text)


def _table(title: str, cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = [f"### {title}\n", "| | " + " | ".join(_LOADERS) + " |", "|---" * (len(_LOADERS) + 1) + "|"]
    for layout in _LAYOUTS:
        shown = [_shown(cells.get((layout, loader))) for loader in _LOADERS]
        lines.append(f"| {'**portable**' if layout == 'portable' else layout} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "—"
    if "refused" in cell:
        return "*not written*"
    count = f"{cell['applied']}/{cell['modules']}"
    if "error" in cell:
        return f"{count}, *refused*"
    if cell["difference"] > AGREEMENT and cell["applied"]:
        return f"{count}, off by {cell['difference']:.2g}"
    return count
