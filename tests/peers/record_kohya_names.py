"""Record which modules sd-scripts trains, and what it calls them.

    python tests/peers/record_kohya_names.py --sd-scripts PATH/TO/sd-scripts --commit HASH --out tests/golden

Needs torch, diffusers and transformers. Writes `kohya_sd15_modules.json` and `kohya_sdxl_modules.json`, each with
sorted lists of names as they stand in a LoRA file, without `.lora_down.weight` and the like:

    unet                            what is trained by default
    unet_conv                       what `conv_dim` adds
    text_encoder, [text_encoder_2]  CLIP-L; for SDXL CLIP-L and OpenCLIP bigG

The networks are built on the meta device: no weights are read or made. sd-scripts wraps diffusers-style classes for
Stable Diffusion 1.x, so diffusers' UNet gives the names; for SDXL it has a UNet of its own, in the original naming.
Newer transformers dropped the level `text_model` from CLIP's module paths; it is put back, as files have it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sd_scripts_headless
import torch
from text_encoders import behind_text_model, text_encoders
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", type=Path, required=True, help="folder of an sd-scripts checkout")
    parser.add_argument("--commit", default="unknown", help="commit of the checkout, for the record")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    arguments = parser.parse_args()
    lora = sd_scripts_headless.boot(arguments.sd_scripts)
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    with torch.device("meta"):
        models = {
            "sd15": (_sd15_unet(), _encoders("sd1")),
            "sdxl": (SdxlUNet2DConditionModel(), _encoders("sdxl")),
        }
        # The convolutions last: asking for them changes the default of the class for good.
        plain = {name: _names(lora, *model) for name, model in models.items()}
        with_convolutions = {name: _names(lora, *model, conv_dim=4) for name, model in models.items()}
    for name, names in plain.items():
        added = sorted(set(with_convolutions[name]["unet"]) - set(names["unet"]))
        record: dict[str, Any] = {"sd_scripts_commit": arguments.commit, **names, "unet_conv": added}
        file = arguments.out / f"kohya_{name}_modules.json"
        file.write_text(json.dumps(record, indent=0) + "\n")
        print(f"{file}: " + ", ".join(f"{len(v)} {k}" for k, v in record.items() if isinstance(v, list)))


def _names(lora: Any, unet: nn.Module, clips: list[nn.Module], conv_dim: int | None = None) -> dict[str, Any]:
    network = lora.create_network(1.0, 4, 1.0, None, clips if len(clips) > 1 else clips[0], unet, conv_dim=conv_dim)
    encoders = sorted(module.lora_name for module in network.text_encoder_loras)
    names = {"unet": sorted(module.lora_name for module in network.unet_loras)}
    if len(clips) == 1:
        return names | {"text_encoder": encoders}
    return names | {
        "text_encoder": [name for name in encoders if name.startswith("lora_te1_")],
        "text_encoder_2": [name for name in encoders if name.startswith("lora_te2_")],
    }


def _sd15_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    return unet


def _encoders(family: str) -> list[nn.Module]:
    return [behind_text_model(encoder) for encoder in text_encoders(family).values()]


if __name__ == "__main__":
    main()
