"""Measure which programs apply which LoRAs completely, and write it down.

    python tests/peers/load_matrix.py --comfyui PATH/TO/ComfyUI --comfyui-python PYTHON --sd-scripts PATH/TO/sd-scripts

Every kind of LoRA in `lora_cases.py` is saved in every layout, for each family, and loaded by each program. Each cell
is `applied / modules` as measured, and the relative difference between that program's answer and ours. diffusers reads
kohya's Flux files and ComfyUI's of Lumina 2 at the real width alone, so that Flux, Chroma and Lumina 2 are loaded there
into one block of each kind at that width.

The transformers of `TRANSFORMERS` are small, and most without sd-scripts, which has no such models;
`comfyui_small.py` says what of ComfyUI is set aside for their widths.

Writes `tests/golden/load_matrix.json` (all numbers, with versions) and `docs/load-matrix.md` (drawn from it). `--only
sd1:lora` measures some rows again and keeps the others, `--layouts` some layouts alone. Needs the development packages
and `lycoris-lora`; PYTHON is an interpreter with ComfyUI's requirements (and einops, for sd-scripts' Flux and Anima).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matrix_page
import torch
from library_loads import LOADERS
from load_report import one_line, report
from lora_cases import CASES, IN_SD_SCRIPTS, TRANSFORMERS, answer, base_model, example, inputs
from safetensors.torch import save_file

from lorasmith.core.errors import LoraError
from lorasmith.families.model import Model
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import PORTABLE, layout_for, save_lora
from lorasmith.training.lora_handle import Lora

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RELEASED_WIDTHS = ("flux1", "chroma", "lumina2")
FAMILIES = ("sd1", "sdxl", "flux1", *TRANSFORMERS)
# Which loaders can be asked for a layout at all; the others' programs have no way to open it.
READERS = {"peft": ("ours", "PEFT"), "": ("ours", "diffusers", "LyCORIS", "ComfyUI", "sd-scripts")}


def main() -> None:
    arguments = _arguments()
    record = json.loads(matrix_page.RECORD.read_text()) if matrix_page.RECORD.is_file() else {"cells": []}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for name in CASES:
                if family not in CASES[name].families:
                    continue
                if arguments.only and f"{family}:{name}" not in arguments.only and family not in arguments.only:
                    continue
                cells = [_short(cell) for cell in _measured(family, name, Path(folder), arguments)]
                measured = {(family, name, layout) for layout in arguments.layouts or (*LAYOUTS, PORTABLE)}
                kept = [c for c in record["cells"] if (c["family"], c["case"], c["layout"]) not in measured]
                record["cells"] = kept + [c for c in cells if (c["family"], c["case"], c["layout"]) in measured]
                matrix_page.write({**record, "versions": _versions(arguments)})
    print(f"{matrix_page.RECORD} and {matrix_page.PAGE}")


def _measured(family: str, name: str, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cells of one kind of LoRA."""
    for shape, loaders in _shapes(family).items():
        model, checkpoint = base_model(shape, folder)
        lora, given = example(CASES[name], model), inputs(shape)
        expected = answer(model, given, lora)
        reference = folder / f"{shape}-{name}-reference.safetensors"
        save_file({**given, "expected": expected.contiguous()}, reference)
        files, refusals, same = _saved(lora, folder / f"{shape}-{name}")
        if arguments.layouts:
            files = {
                layout: path for layout, path in files.items() if {layout, *same.get(layout, ())} & {*arguments.layouts}
            }
        wanted = {f"{ref.component}.{ref.path}" for ref in (*lora.state.adapters, *lora.state.differences)}
        cells = []
        for loader in loaders:
            readable = {layout: path for layout, path in files.items() if loader in READERS.get(layout, READERS[""])}
            if not readable:
                continue
            if loader in LOADERS:
                lines = [_line(LOADERS[loader], model, path, given, wanted, expected) for path in readable.values()]
            else:
                lines = _elsewhere(loader, checkpoint, list(readable.values()), reference, arguments)
            for layout, line in zip(readable, lines, strict=True):
                cells += [{"layout": one, "loader": loader, **line} for one in (layout, *same.get(layout, ()))]
            _say(shape, name, loader)
        if loaders[0] == "ours":
            cells += [
                {"layout": layout, "loader": loader, "refused": str(refusal)}
                for layout, refusal in refusals.items()
                for loader in READERS.get(layout, READERS[""])
            ]
        yield from ({"family": family, "case": name, **cell} for cell in cells)


def _saved(lora: Lora, start: Path) -> tuple[dict[str, Path], dict[str, LoraError], dict[str, list[str]]]:
    """A LoRA in every layout: files by layout, refusals by layout, and layouts whose file is that of another."""
    files: dict[str, Path] = {}
    refusals: dict[str, LoraError] = {}
    for layout in (*LAYOUTS, PORTABLE):
        path = start.with_name(f"{start.name}-{layout}" + (".safetensors" if layout != "peft" else ""))
        try:
            save_lora(path, lora.state, lora.names, layout=layout)
            files[layout] = path
        except LoraError as refusal:
            refusals[layout] = refusal
    usual = layout_for(PORTABLE, lora.names, lora.state).name
    if files[PORTABLE].read_bytes() == files[usual].read_bytes():
        del files[PORTABLE]
        return files, refusals, {usual: [PORTABLE]}
    return files, refusals, {}


def _shapes(family: str) -> dict[str, tuple[str, ...]]:
    """Model shapes of a family, and who loads into each."""
    everyone = ("ours", "diffusers", "PEFT", "LyCORIS", "ComfyUI", "sd-scripts")
    without = {"diffusers"} if family in RELEASED_WIDTHS else set()
    without |= {"sd-scripts"} if family in TRANSFORMERS and family not in IN_SD_SCRIPTS else set()
    wide = {f"{family}-wide": ("diffusers",)} if family in RELEASED_WIDTHS else {}
    return {family: tuple(one for one in everyone if one not in without), **wide}


def _line(load: Any, model: Model, path: Path, given: Any, wanted: set[str], expected: torch.Tensor) -> dict[str, Any]:
    try:
        return report(load(model, path, given, wanted), expected)
    except Exception as problem:  # a program's refusal is a finding, whatever its class
        return {"modules": len(wanted), "applied": 0, "difference": None, "error": one_line(problem)}


def _elsewhere(
    loader: str, checkpoint: Path, files: list[Path], reference: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Lines of a program that runs in a process, and an environment, of its own."""
    script, option, checkout = {
        "ComfyUI": ("comfyui_loads.py", "--comfyui", arguments.comfyui),
        "sd-scripts": ("sd_scripts_loads.py", "--sd-scripts", arguments.sd_scripts),
    }[loader]
    command = [
        str(arguments.comfyui_python),
        str(HERE / script),
        option,
        str(checkout),
        "--checkpoint",
        str(checkpoint),
    ]
    ran = subprocess.run(
        [*command, *(f"{path}={reference}" for path in files)], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(files):
        sys.exit(f"{loader} answered {len(lines)} of {len(files)} times:\n{ran.stdout}\n{ran.stderr}")
    return [{key: value for key, value in line.items() if key != "lora"} for line in lines]


def _short(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with one name of those that were not applied, and numbers of three digits."""
    rounded = {key: float(f"{value:.2e}") if isinstance(value, float) else value for key, value in cell.items()}
    missed = cell.get("not_applied", [])
    return {key: value for key, value in rounded.items() if key != "not_applied"} | (
        {"not_applied": missed[:1]} if missed else {}
    )


def _say(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)


def _versions(arguments: argparse.Namespace) -> dict[str, str]:
    packages = {"diffusers": "diffusers", "PEFT": "peft", "LyCORIS": "lycoris-lora"}
    packages |= {name: name for name in ("transformers", "torch")}
    return {
        **{name: version(package) for name, package in packages.items()},
        "ComfyUI": arguments.comfyui_version,
        "sd-scripts": arguments.sd_scripts_version,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument(
        "--comfyui-python", type=Path, default=Path(sys.executable), help="interpreter for both checkouts"
    )
    parser.add_argument("--comfyui-version", default="unknown", help="version or commit of the checkout")
    parser.add_argument("--sd-scripts", type=Path, required=True, help="folder of an sd-scripts checkout")
    parser.add_argument("--sd-scripts-version", default="unknown", help="version or commit of the checkout")
    parser.add_argument("--only", nargs="*", default=[], help="family, or family:case, to measure again")
    parser.add_argument("--layouts", nargs="*", choices=(*LAYOUTS, PORTABLE), help="layouts to measure; all by default")
    return parser.parse_args()


if __name__ == "__main__":
    main()
