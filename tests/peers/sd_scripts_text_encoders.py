"""Load LoRAs on text encoders with sd-scripts' own network code and compare what the encoders answer.

    python tests/peers/sd_scripts_text_encoders.py --sd-scripts PATH/TO/sd-scripts

For each family whose text encoders are trained: random encoders, narrow and as deep as the released ones, and a LoRA on
all layers that training gives one, saved as kohya names it. Prints how many layers sd-scripts applies, and the greatest
difference between its encoders' states and those of the merged LoRA, as a share of the LoRA's effect. Exits with 1 if a
layer is left out or states differ. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import sd_scripts_headless
import torch
from safetensors.torch import load_file
from text_encoders import behind_text_model, text_encoder
from torch import Tensor, nn

from lorasmith.adapters.patch import Patch, patches_applied
from lorasmith.core.adapter_state import AdapterState, AdapterWeights
from lorasmith.families.base import FAMILIES
from lorasmith.formats.names import ModelNames, encoder_module
from lorasmith.training.lora_handle import Lora

LIMIT = 1e-4
CASES = {
    "sd1": ("networks.lora", {"text_encoder": 12}),
    "sdxl": ("networks.lora", {"text_encoder": 12, "text_encoder_2": 32}),
    "flux1": ("networks.lora_flux", {"text_encoder": 12}),
    "sd3": ("networks.lora_sd3", {"text_encoder": 12, "text_encoder_2": 32}),
}
"""sd-scripts' module, and layers of the text encoders by component."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", type=Path, required=True)
    sd_scripts_headless.boot(parser.parse_args().sd_scripts)
    wrong = 0
    for family, (module, layers) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            count, applied, difference = checked(family, module, layers, Path(folder) / "lora.safetensors")
        print(f"{family}: {applied} of {count} layers applied, states differ by {difference:.1e}", flush=True)
        wrong += applied != count or not difference < LIMIT
    return 1 if wrong else 0


@torch.no_grad()
def checked(name: str, module: str, layers: dict[str, int], path: Path) -> tuple[int, int, float]:
    """Layers of the LoRA, layers that sd-scripts applies, and the difference of states."""
    family = FAMILIES[name]
    encoders = {component: text_encoder(component, count) for component, count in layers.items()}
    names = ModelNames(
        family=name, denoiser={}, peft_prefix=family.denoiser_folder, text_encoders=family.encoder_names(encoders)
    )
    draw = torch.Generator().manual_seed(0)
    patches: dict[str, Patch] = {}
    adapters = {}
    for component, paths in family.trained_encoders(encoders).items():
        own = {}
        for place in paths:
            out, inside = encoders[component].get_submodule(place).weight.shape
            down, up = torch.randn(4, inside, generator=draw), torch.randn(out, 4, generator=draw)
            own[place] = AdapterWeights("lora", {"down": 0.1 * down, "up": 0.1 * up}, alpha=2.0)
            adapters[encoder_module(names, f"{component}.{place}")] = own[place]
        patches[component] = Patch(own)
    Lora(AdapterState(adapters), names, torch.float32).save(path, layout="kohya")
    weights = load_file(str(path))

    def states() -> list[Tensor]:
        ids = torch.arange(10)[None]
        return [encoder(ids, output_hidden_states=True).hidden_states[-1] for encoder in encoders.values()]

    plain = states()
    expected = []
    for component, encoder in encoders.items():
        with patches_applied(encoder, [patches[component]] if component in patches else []):
            expected.append(encoder(torch.arange(10)[None], output_hidden_states=True).hidden_states[-1])
    theirs: Any = [behind_text_model(encoder) for encoder in encoders.values()]
    if module == "networks.lora":
        theirs = theirs if len(theirs) > 1 else theirs[0]
    else:
        theirs += [None] * (2 + (name == "sd3") - len(theirs))  # without T5
    network, _ = importlib.import_module(module).create_network_from_weights(
        1.0, None, None, theirs, nn.Module(), weights_sd=weights
    )
    network.apply_to(theirs, nn.Module(), apply_text_encoder=True, apply_unet=False)
    left = {key.partition(".")[0] for key in network.load_state_dict(weights, strict=False).unexpected_keys}
    found = states()
    differences = [
        float((one - other).abs().max() / (other - without).abs().max())
        for one, other, without in zip(found, expected, plain, strict=True)
        if not torch.equal(other, without)
    ]
    return len(adapters), len(adapters) - len(left), max(differences)


if __name__ == "__main__":
    sys.exit(main())
