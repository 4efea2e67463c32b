from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.runs.drawing import load_with_loras, save_pictures
from lorasmith.training.lora_handle import Lora

LAYERS = {
    "denoiser": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
}


def test_loras_are_applied_to_denoiser_and_text_encoder_at_their_strength(tiny: Model, tmp_path: Path) -> None:
    widths = {
        "denoiser": tiny.denoiser.module.get_submodule(LAYERS["denoiser"]).in_features,
        "text_encoder": tiny.components.text_encoders["text_encoder"].config.hidden_size,
    }
    adapters = {
        ModuleRef(component, LAYERS[component]): AdapterWeights(
            "lora", {"down": torch.randn(2, width), "up": torch.randn(width, 2)}, alpha=2.0
        )
        for component, width in widths.items()
    }
    state = AdapterState(adapters)
    file = Lora(state, tiny.names, torch.float32).save(tmp_path / "cat.safetensors")
    loaded = load_with_loras(ModelFiles("lorasmith-tiny"), [(file, 0.5), (file, 0.25)])
    assert loaded.title == "lorasmith-tiny"
    assert [patch.strength for patch in loaded.denoiser.patches] == [0.5, 0.25]
    plain = load_with_loras(ModelFiles("lorasmith-tiny"), []).text_encoder
    with plain.active(), loaded.text_encoder.active():
        before, after = plain.encode("a cat"), loaded.text_encoder.encode("a cat")
    assert not torch.equal(before.tensors["context"], after.tensors["context"])


def test_files_are_numbered_and_say_how_they_were_made(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8)) for _ in range(2)]
    for first in (1, 3):
        paths = save_pictures(pictures, ["a cat", "a dog"], tmp_path / "out", made_with="Steps: 2")
        assert [path.name for path in paths] == [f"lorasmith_{first + index:05}_.png" for index in range(2)]
    with Image.open(paths[1]) as image:
        assert image.info["parameters"] == "a dog\nSteps: 2"
