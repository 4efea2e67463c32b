"""What the scripts that load LoRAs in other programs share: their arguments, and the line they print for each LoRA.

    python tests/peers/PROGRAM_loads.py --PROGRAM CHECKOUT --checkpoint MODEL.safetensors LORA=REFERENCE ...

MODEL is in the original layout. REFERENCE is a safetensors file with the inputs `x`, `timestep`, `context`, for Flux
`pooled` and `guidance` too, as `comfyui_headless.denoise` describes them, and `expected`: another program's answer with
the same LoRA applied at strength 1.

Each LoRA gives one line of JSON:

    lora                   as it was named
    modules, applied       modules that the file names (a LoRA pair, a `diff`, ...), and how many were applied
    not_applied            the names of the others, ten at most
    difference             relative: ‖with LoRA − expected‖ / ‖expected‖
    effect                 relative: ‖with LoRA − without‖ / ‖expected‖, what a LoRA without effect would be off by
    error                  where the program refused the file: what it said, in one line

The exit code is 1 if a module was left out or a difference exceeds the tolerance anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

_SUFFIXES = (
    ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".lora_A.weight", ".lora_B.weight",
    ".lora.up.weight", ".lora.down.weight", ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight",
)  # fmt: skip


class Loaded(NamedTuple):
    """What a program made of a LoRA.

    Attributes:
        named: the modules that the file names.
        failed: those of them that were not applied.
        output: the denoiser's answer with the LoRA.
        without: its answer without.
    """

    named: Collection[str]
    failed: Collection[str]
    output: Any
    without: Any


def parser(description: str | None, program: str) -> argparse.ArgumentParser:
    """The arguments that all scripts have; `program` names the option for its checkout."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("loras", nargs="+", metavar="LORA=REFERENCE", help="a LoRA file, and inputs with its output")
    result.add_argument(f"--{program}", type=Path, required=True, help=f"folder of a {program} checkout")
    result.add_argument("--checkpoint", type=Path, required=True, help="model in the original layout")
    result.add_argument("--tolerance", type=float, default=1e-3)
    return result


def run(arguments: argparse.Namespace, load: Callable[[Path, dict[str, Any]], Loaded]) -> None:
    """Load each LoRA with `load(file, inputs)`, print its line, and leave with the exit code."""
    from safetensors.torch import load_file

    fine = True
    for pair in arguments.loras:
        lora, _, reference = pair.partition("=")
        inputs = load_file(reference)
        expected = inputs.pop("expected")
        try:
            line = report(load(Path(lora), inputs), expected)
        except Exception as problem:  # the program's own refusal is a finding, whatever its class
            named = {base_of(key) for key in load_file(lora)}
            line = {"modules": len(named), "applied": 0, "not_applied": sorted(named)[:10], "difference": None}
            line |= {"effect": 0.0, "error": one_line(problem)}
        fine &= "error" not in line and line["applied"] == line["modules"]
        fine &= line["difference"] is not None and line["difference"] <= arguments.tolerance
        print(json.dumps({"lora": lora, **line}), flush=True)
    sys.exit(int(not fine))


def report(loaded: Loaded, expected: Any) -> dict[str, Any]:
    """The numbers of one line."""
    return {
        "modules": len(loaded.named),
        "applied": len(loaded.named) - len(loaded.failed),
        "not_applied": sorted(loaded.failed)[:10],
        "difference": ((loaded.output - expected).norm() / expected.norm()).item(),
        "effect": ((loaded.output - loaded.without).norm() / expected.norm()).item(),
    }


def one_line(problem: Exception) -> str:
    """`ValueError: what it said`, 160 characters at most."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:160]


def base_of(key: str) -> str:
    """The name of a key's module: everything before the part that says which tensor of the adapter it is."""
    for suffix in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    return key.rpartition(".")[0]
