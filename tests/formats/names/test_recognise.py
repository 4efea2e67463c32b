from __future__ import annotations

from lorasmith.formats.spelling import block_of, component_of, guessed_family, kind_of


def test_families() -> None:
    for base, width, family in [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, "Stable Diffusion 1.x"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 1024, "Stable Diffusion 2.x"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, "Stable Diffusion XL"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k", 640, "Stable Diffusion"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320, "Stable Diffusion"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, "Stable Diffusion XL"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, None),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "Flux.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, "Flux.1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 6144, "Flux.2"),
        ("lora_unet_single_blocks_20_linear1", 3072, "Flux.1"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072, "Flux.2 klein"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 2432, "Stable Diffusion 3.5"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", 2432, "Stable Diffusion 3.5"),
        ("transformer.transformer_blocks.30.attn.add_q_proj", 2432, "Stable Diffusion 3.5"),
        ("transformer.transformer_blocks.18.attn.add_q_proj", 3072, "Flux.1"),
        ("transformer.transformer_blocks.19.attn.add_q_proj", 3072, "Qwen-Image"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", 4096, "Flux.1"),
        ("diffusion_model.transformer_blocks.0.img_mlp.net.2", 12288, "Qwen-Image"),
        ("diffusion_model.layers.0.attention.to_q", 3840, "Z-Image"),
        ("diffusion_model.layers.0.attention.qkv", 2304, "Lumina 2"),
        ("diffusion_model.layers.0.attention.qkv", 4608, "Ideogram 4"),
        ("lora_unet_layers_0_attention_o", 64, "Ideogram 4"),
        ("lora_unet_blocks_0_self_attn_q", 5120, "Wan"),
        ("transformer.blocks.0.attn1.to_q", 1536, "Wan"),
        ("transformer.layers.0.self_attention.to_q", 4096, "ERNIE-Image"),
        ("lora_unet_layers_3_mlp_linear_fc2", 12288, "ERNIE-Image"),
        ("diffusion_model.blocks.0.ffn.0", 3072, "Wan 2.2 5B"),
        ("diffusion_model.blocks.0.cross_attn.k_img", 5120, "Wan image to video"),
        ("lora_unet_something_else", 5, None),
    ]:
        for suffix in ("lora_down.weight", "lora_A.weight", "hada_w1_b"):
            assert guessed_family({f"{base}.{suffix}": (4, width)}) == family


def test_metadata_tell_families_of_the_same_names_apart() -> None:
    for metadata, family in [
        ({"ss_base_model_version": "chroma"}, "Chroma"),
        ({"modelspec.architecture": "chroma/lora"}, "Chroma"),
        ({"modelspec.architecture": "Chroma"}, "Chroma"),
        ({"ss_base_model_version": "flux1"}, "Flux.1"),
        ({}, "Flux.1"),
    ]:
        for base in ("lora_unet_double_blocks_0_img_attn_qkv", "transformer.single_transformer_blocks.0.attn.to_q"):
            assert guessed_family({f"{base}.lora_down.weight": (4, 3072)}, metadata) == family
        own = "lora_unet_distilled_guidance_layer_layers_0_in_layer.lora_down.weight"
        assert guessed_family({own: (4, 5120)}, {}) == "Chroma"


def test_width_may_be_shown_by_any_module() -> None:
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{}_to_k.lora_down.weight"
    assert guessed_family({unet.format(1): (4, 320), unet.format(2): (4, 768)}) == "Stable Diffusion 1.x"


def test_components_and_blocks() -> None:
    for base, component, block in [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text_encoder", "layers.3"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "text_encoder", "layers.3"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "text_encoder_2", "layers.3"),
        ("text_encoder_2.text_model.encoder.layers.11.mlp.fc1", "text_encoder_2", "layers.11"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1", "text_encoder_2", "layers.1"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.1.mlp.fc1", "text_encoder", "layers.1"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3", ""),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "denoiser", "down_blocks.1"),
        ("diffusion_model.middle_block.1.proj_in", "denoiser", "middle_block"),
        ("unet.conv_in", "denoiser", ""),
        ("transformer.single_transformer_blocks.37.proj_out", "denoiser", "single_transformer_blocks.37"),
        ("transformer.text_fusion.layerwise_blocks.0.attn.to_q", "denoiser", "text_fusion.layerwise_blocks.0"),
        ("lora_unet_txtfusion_refiner_blocks_1_attn_wq", "denoiser", "txtfusion_refiner_blocks.1"),
        ("diffusion_model.llm_adapter.blocks.2.self_attn.q_proj", "denoiser", "llm_adapter.blocks.2"),
        ("diffusion_model.blocks.2.attn.wq", "denoiser", "blocks.2"),
    ]:
        assert component_of(base) == component
        assert block_of(base) == block


def test_the_kind_of_a_layer() -> None:
    for base, kind in [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "attn1_to_q"),
        ("unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj", "ff_net_0_proj"),
        ("diffusion_model.input_blocks.4.1.proj_in", "proj_in"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v", "attn2_to_v"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "conv1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "img_attn_qkv"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "self_attn_q_proj"),
        ("lora_unet_conv_in", "conv_in"),
    ]:
        assert kind_of(base) == kind
