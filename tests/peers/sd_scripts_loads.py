"""Load a LoRA with sd-scripts' own network code and compare what the denoiser answers.

    python tests/peers/sd_scripts_loads.py --sd-scripts PATH/TO/sd-scripts LORA.safetensors \\
        --checkpoint MODEL.safetensors --reference REFERENCE.safetensors [--strength 1.0] [--tolerance 1e-4]

MODEL is a Stable Diffusion 1.x UNet in the original layout, of a shape that `models.py` lists; it runs in diffusers'
UNet, which sd-scripts' network wraps. REFERENCE and the JSON line printed are those of `comfyui_loads.py`; only
modules of the UNet (`lora_unet_…`) are counted. The exit code is 1 if a module was left out or the difference exceeds
the tolerance. Needs torch, diffusers and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import models
import sd_scripts_headless
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def main() -> None:
    arguments = _arguments()
    lora = sd_scripts_headless.boot(arguments.sd_scripts)
    unet = _unet(arguments.checkpoint)
    reference = load_file(str(arguments.reference))
    expected = reference.pop("expected")
    without = _denoise(unet, **reference)

    weights = load_file(str(arguments.lora))
    network, _ = lora.create_network_from_weights(arguments.strength, None, None, [], unet, weights_sd=weights)
    network.apply_to([], unet, apply_text_encoder=False)
    unexpected = set(network.load_state_dict(weights, strict=False).unexpected_keys)
    output = _denoise(unet, **reference)

    named = {key.partition(".")[0] for key in weights if not key.startswith("lora_te")}
    failed = {key.partition(".")[0] for key in unexpected if not key.startswith("lora_te")}
    difference = ((output - expected).norm() / expected.norm()).item()
    report = {
        "modules": len(named),
        "applied": len(named) - len(failed),
        "not_applied": sorted(failed)[:10],
        "difference": difference,
        "effect": ((output - without).norm() / expected.norm()).item(),
    }
    print(json.dumps(report))
    sys.exit(int(bool(failed) or not difference <= arguments.tolerance))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="the LoRA file")
    parser.add_argument("--sd-scripts", type=Path, required=True, help="folder of an sd-scripts checkout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="model in the original layout")
    parser.add_argument("--reference", type=Path, required=True, help="inputs and the expected output")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def _unet(checkpoint: Path) -> nn.Module:
    """diffusers' UNet of the file, through diffusers' own conversion."""
    from diffusers import UNet2DConditionModel

    sizes = {key: tuple(tensor.shape) for key, tensor in load_file(str(checkpoint)).items()}
    for shape in (models.SD1_TINY, models.SD1_FULL):
        if all(sizes.get(shape.prefix + name) == size for name, size in shape.tensors()):
            break
    else:
        sys.exit(
            f"{checkpoint} has none of the shapes in models.py; use models.SD1_TINY or a Stable Diffusion 1.x file"
        )
    with tempfile.TemporaryDirectory() as folder:
        UNet2DConditionModel.from_config(models.diffusers_config(shape)).save_config(folder)
        unet: nn.Module = UNet2DConditionModel.from_single_file(
            str(checkpoint), config=folder, local_files_only=True, torch_dtype=torch.float32
        )
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def _denoise(unet: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    output: Tensor = unet(x, timestep, context).sample
    return output


if __name__ == "__main__":
    main()
