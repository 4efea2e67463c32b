"""Load a LoRA with ComfyUI's own code and compare what the denoiser answers.

    python tests/peers/comfyui_loads.py --comfyui PATH/TO/ComfyUI LORA.safetensors --checkpoint MODEL.safetensors \\
        --reference REFERENCE.safetensors [--strength 1.0] [--tolerance 1e-4]

MODEL is in the original layout (Stable Diffusion 1.x UNet of any width, Flux.1, or whatever ComfyUI detects).
REFERENCE holds `x`, `timestep`, `context` and `expected`, for Flux `pooled` and `guidance` too, as
`comfyui_headless.denoise` describes them; `expected` is another program's answer with the same LoRA applied.

Prints one JSON line:
    modules, applied       modules that the file names (a LoRA pair, a `diff`, ...), and how many ComfyUI applied
    not_applied            the names of the others, ten at most
    difference             relative: ‖ComfyUI with LoRA − expected‖ / ‖expected‖
    effect                 relative: ‖ComfyUI with LoRA − ComfyUI without‖ / ‖expected‖, what a LoRA without effect
                           would be off by
The exit code is 1 if a module was left out or the difference exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import comfyui_headless


def main() -> None:
    arguments = _arguments()
    comfyui_headless.boot(arguments.comfyui)
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_management
    import torch
    from safetensors.torch import load_file

    reference = load_file(str(arguments.reference))
    expected = reference.pop("expected")
    patcher = comfyui_headless.load_model(arguments.checkpoint, torch.float32)
    without = comfyui_headless.denoise(patcher.model.diffusion_model, **reference)

    tensors = comfy.lora_convert.convert_lora(load_file(str(arguments.lora)))
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    listener = _NotLoaded()
    logging.getLogger().addHandler(listener)
    patches = comfy.lora.load_lora(tensors, names)
    patched = patcher.clone()
    taken = set(patched.add_patches(patches, arguments.strength))
    comfy.model_management.load_models_gpu([patched])
    output = comfyui_headless.denoise(patched.model.diffusion_model, **reference)

    modules = {_module(key) for key in tensors}
    failed = {_module(key) for key in listener.keys} | {str(key) for key in patches if key not in taken}
    difference = ((output - expected).norm() / expected.norm()).item()
    report = {
        "modules": len(modules),
        "applied": len(modules) - len(failed),
        "not_applied": sorted(failed)[:10],
        "difference": difference,
        "effect": ((output - without).norm() / expected.norm()).item(),
    }
    print(json.dumps(report))
    sys.exit(int(bool(failed) or not difference <= arguments.tolerance))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="the LoRA file")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="model in the original layout")
    parser.add_argument("--reference", type=Path, required=True, help="inputs and the expected output")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


class _NotLoaded(logging.Handler):
    """Collects the keys that ComfyUI says it did not load, or could not merge: it raises for neither."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("lora key not loaded: "):
            self.keys.append(message.removeprefix("lora key not loaded: "))
        elif record.levelno >= logging.ERROR:
            self.keys.append(message.split(":")[0])


def _module(key: str) -> str:
    """The name of a key's module: everything before the part that says which tensor of the adapter it is."""
    suffixes = (
        ".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".lora_A.weight", ".lora_B.weight",
        ".lora.up.weight", ".lora.down.weight",
    )  # fmt: skip
    for suffix in suffixes:
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    return key.rpartition(".")[0]


if __name__ == "__main__":
    main()
