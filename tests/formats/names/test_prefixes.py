"""Prefixes of all layouts are cut off, and say which part of a model a module is in."""

from __future__ import annotations

from lorasmith.formats.spelling import component_of, without_prefix


def test_what_stands_before_a_path() -> None:
    for base, component, path in [
        ("lora_unet_conv_in", "denoiser", "conv_in"),
        ("lycoris_conv_in", "denoiser", "conv_in"),
        ("model.diffusion_model.out.0", "denoiser", "out.0"),
        ("transformer.norm_out.linear", "denoiser", "norm_out.linear"),
        ("down_blocks.0.conv", "denoiser", "down_blocks.0.conv"),
        ("base_model.model.conv_in", "denoiser", "conv_in"),
        ("text_encoder_2/base_model.model.wi", "text_encoder_2", "wi"),
        ("lora_te_text_model_x", "text_encoder", "text_model_x"),
        ("lora_te1_text_model_x", "text_encoder", "text_model_x"),
        ("lora_te4_x", "text_encoder_4", "x"),
        ("text_encoder_3.x", "text_encoder_3", "x"),
        ("text_encoders.clip_g.transformer.x", "text_encoder_2", "x"),
        ("text_encoders.t5xxl.transformer.x", "text_encoder_3", "x"),
        ("text_encoders.qwen3_4b.transformer.x", "text_encoder", "x"),
    ]:
        assert component_of(base) == component
        assert without_prefix(base) == path
