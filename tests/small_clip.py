"""A small CLIP with random weights, as transformers saves it."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from lorasmith.families.loading import load_model


def small_clip(folder: Path) -> Path:
    """The folder, with the CLIP in it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**sizes).to_dict(),
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16).to_dict(),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    next(iter(load_model("lorasmith-tiny").components.tokenizers.values())).save_pretrained(folder)
    return folder
