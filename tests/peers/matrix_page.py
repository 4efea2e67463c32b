"""The page that sums the load matrix up, drawn from the recorded numbers.

python tests/peers/matrix_page.py FAMILY...     print every number of these families
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "golden" / "load_matrix.json"
PAGE = ROOT / "docs" / "load-matrix.md"
AGREEMENT = 1e-3
"""Relative difference up to which two answers are the same."""

_LOADERS = ("ours", "ComfyUI", "diffusers", "sd-scripts", "LyCORIS", "PEFT")
_LAYOUTS = ("portable", "kohya", "comfy", "ai-toolkit", "diffusers", "peft")

Cell = dict[str, Any]

_INTRODUCTION = """\
# Which program applies what

The tables show which program applies which LoRA file completely. Every kind of LoRA that Lorasmith writes, in
every layout, was loaded by each program with its own code into the same random model. Two things were measured:
how many of the modules in the file (or, for diffusers, PEFT and our own loader, in the model) it applied, and
how far the output of the denoiser differs from ours. A LoRA is applied completely if all modules are and the
outputs differ by less than a thousandth. All numbers are in
[load_matrix.json](../tests/golden/load_matrix.json); `python tests/peers/matrix_page.py sdxl` prints those of a
family.

- **portable** is the default layout.
- A dash: the program cannot open this layout, or has no model of the family. PEFT reads only its own folders.
- sd-scripts is its own network (`networks.lora`, `lora_flux`, `lora_sd3`, `lora_lumina`, `lora_anima`); it loads the
  other algorithms with LyCORIS.
- ai-toolkit: original names after `diffusion_model.`, and diffusers' names for Z-Image.
- Flux and Chroma: fused layers (q, k, v) count as one in kohya's and ComfyUI's names. diffusers reads kohya's names of
  them, and ComfyUI's of Lumina 2, only at the real width. There it is measured on one block of each kind.
- The newer transformers are measured on small models of narrow widths, which ComfyUI is made to accept. Their fused
  layers count as one as well. Of these, sd-scripts has only Stable Diffusion 3.5, Anima, Lumina 2 and Chroma. Its
  sister project musubi-tuner was not measured.

`lorasmith check` and `lorasmith convert` warn of combinations below the full count.
"""


def write(record: dict[str, Any]) -> None:
    """Keep the record, and draw the page from it."""
    from lora_cases import CASES  # which the page does not need

    families, kinds = _families(record), list(CASES)
    record["cells"].sort(key=lambda cell: (families.index(cell["family"]), kinds.index(cell["case"])))
    lines = ",\n".join(json.dumps(cell, sort_keys=True) for cell in record["cells"])
    versions = json.dumps(record["versions"], sort_keys=True)
    RECORD.write_text(f'{{"versions": {versions},\n"cells": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def page(record: dict[str, Any]) -> str:
    """The page in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = [_INTRODUCTION, *textwrap.wrap(f"Measured with {versions} by `tests/peers/load_matrix.py`.", 120), ""]
    text += ["## Portable files, by model", "", *_header("model", _LOADERS[1:5])]
    for family in _families(record):
        cells = [cell for cell in record["cells"] if (cell["family"], cell["layout"]) == (family, "portable")]
        shown = [_summed([cell for cell in cells if cell["loader"] == loader]) for loader in _LOADERS[1:5]]
        text.append(f"| {FAMILIES[family].title} | " + " | ".join(shown) + " |")
    text += ["", "## LoRAs that are applied completely, by layout", "", *_header("layout", _LOADERS)]
    for layout in _LAYOUTS:
        cells = [cell for cell in record["cells"] if cell["layout"] == layout and "refused" not in cell]
        shown = [_counted([cell for cell in cells if cell["loader"] == loader]) for loader in _LOADERS]
        text.append(f"| {layout} | " + " | ".join(shown) + " |")
    return "\n".join(text) + "\n"


def tables(record: dict[str, Any], family: str) -> Iterator[str]:
    """Every number of a family, in a table for each kind of LoRA."""
    for kind in _kinds(record["cells"]):
        cells = [cell for cell in record["cells"] if (cell["family"], cell["case"]) == (family, kind)]
        if cells:
            yield "\n".join([f"### {family}: {kind}", "", *_header("", _LOADERS)])
            by_place = {(cell["layout"], cell["loader"]): cell for cell in cells}
            for layout in _LAYOUTS:
                yield f"| {layout} | " + " | ".join(_shown(by_place.get((layout, one))) for one in _LOADERS) + " |"
            yield ""


def _families(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["family"] for cell in record["cells"]))


def _kinds(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["case"] for cell in cells))


def _header(first: str, columns: tuple[str, ...]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def _is_complete(cell: Cell) -> bool:
    return "error" not in cell and cell["applied"] == cell["modules"] and cell["difference"] <= AGREEMENT


def _summed(cells: list[Cell]) -> str:
    """Which kinds a program applies completely."""
    whole, rest = (_kinds([cell for cell in cells if _is_complete(cell) == wanted]) for wanted in (True, False))
    if not cells:
        return "—"
    if not rest:
        return f"all {len(whole)}"
    return f"all but {', '.join(rest)}" if len(rest) < len(whole) else ", ".join(whole) or "none"


def _counted(cells: list[Cell]) -> str:
    return f"{sum(map(_is_complete, cells))} of {len(cells)}" if cells else "—"


def _shown(cell: Cell | None) -> str:
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(tables(json.loads(RECORD.read_text(encoding="utf-8")), name)))
