"""Random text encoders for LoRAs that have something for them: narrow, and as deep as the released ones.

Their layers are counted as applied or not, and never run.
"""

from __future__ import annotations

from torch import nn

WIDTH = 64

LAYERS = {"sd1": {"text_encoder": 12}, "sdxl": {"text_encoder": 12, "text_encoder_2": 32}}
"""Layers of a family's text encoders by component: CLIP-L, and OpenCLIP bigG, whose pooled vector is projected."""


def text_encoders(family: str) -> dict[str, nn.Module]:
    """The text encoders of a family by component."""
    return {component: text_encoder(component, layers) for component, layers in LAYERS[family].items()}


def text_encoder(component: str, layers: int, width: int = WIDTH) -> nn.Module:
    """One text encoder, of transformers' class for the component."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    config = CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 64, vocab_size=1000)
    encoder: nn.Module = kind(config).eval()
    return encoder


def behind_text_model(encoder: nn.Module) -> nn.Module:
    """The encoder with its layers behind `text_model.`, as files have them; newer transformers dropped that."""
    if hasattr(encoder, "text_model"):
        return encoder
    named = nn.Module()
    named.text_model = encoder
    return named
