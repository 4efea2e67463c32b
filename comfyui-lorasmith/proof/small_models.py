"""Small networks of every class of `comfy.supported_models`, as its detection would describe them of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Small:
    """A small model of a family: what ComfyUI's detection would find in its file."""

    config: str  # class of `comfy.supported_models`
    settings: dict[str, Any]  # of its network
    channels: int = 16  # of latents
    context: int = 128  # width
    options: Callable[[torch.Generator], dict[str, Any]] = field(default=lambda generator: {})  # of a conditioning
    frames: int = 0  # of latents, 0 for pictures without
    tokens: int = 77
    size: tuple[int, ...] = (16, 16)  # of latents
    beside: Callable[[torch.Generator], dict[str, torch.Tensor]] = field(default=lambda generator: {})  # the network


_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
}
_FLUX: dict[str, Any] = {
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
    "hidden_size": 384,
    "num_heads": 3,
    "depth": 2,
    "depth_single_blocks": 4,
}


def _pooled(width: int, **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator), **options}


def _llama(generator: torch.Generator) -> dict[str, Any]:
    return {**_pooled(2048)(generator), "conditioning_llama3": torch.randn(1, 2, 77, 128, generator=generator)}


def _text_ids(generator: torch.Generator) -> dict[str, Any]:
    return {"text_input_ids": torch.randint(0, 1000, (1, 20), generator=generator)}


def _lyrics(generator: torch.Generator) -> dict[str, Any]:
    return {"conditioning_lyrics": torch.randn(1, 12, 128, generator=generator)}


def _t5_ids(generator: torch.Generator) -> dict[str, Any]:
    return {"t5xxl_ids": torch.randint(0, 32128, (77,), generator=generator), "t5xxl_weights": torch.ones(77)}


_MMDIT: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "depth": 3,  # times 64 is the width
    "adm_in_channels": 256,
    "input_size": None,
    "num_patches": 1024,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 128, "out_features": 192}},
}
_LUMINA: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "cap_feat_dim": 128, "n_layers": 2, "qk_norm": True}
_COSMOS: dict[str, Any] = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 256,
    "num_blocks": 2,
    "num_heads": 2,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 128,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 64,
    "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}

FAMILIES = {
    "sd1": Small(
        "SD15",
        {
            **_UNET,
            "num_heads": 8,
            "num_head_channels": -1,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "transformer_depth": [1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1],
        },
        channels=4,
        context=768,
    ),
    "sdxl": Small(
        "SDXL",
        {
            **_UNET,
            "num_heads": -1,
            "num_head_channels": 64,
            "context_dim": 256,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "transformer_depth": [0, 2],
            "transformer_depth_middle": 2,
            "transformer_depth_output": [0, 0, 2, 2],
        },
        channels=4,
        context=256,
        options=_pooled(1280),
    ),
    "sd3": Small("SD3", _MMDIT, options=_pooled(256)),
    "flux": Small(
        "Flux",
        {
            **_FLUX,
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "context_in_dim": 768,
            "vec_in_dim": 256,
        },
        context=768,
        options=_pooled(256, guidance=3.5),
    ),
    "flux2": Small(
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "axes_dim": [32, 32, 32, 32],
            "mlp_ratio": 3.0,
            "theta": 2000,
            "patch_size": 1,
            "in_channels": 128,
            "out_channels": 128,
            "context_in_dim": 128,
            "vec_in_dim": None,
            "qkv_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
        },
        channels=128,
        options=lambda generator: {"guidance": 3.5},
    ),
    "chroma": Small(
        "Chroma",
        {
            **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 384,
            "hidden_dim": 128,
            "n_layers": 2,
            "context_in_dim": 128,
            "vec_in_dim": None,
        },
    ),
    "lumina2": Small(
        "Lumina2",
        {**_LUMINA, "image_model": "lumina2", "dim": 192, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 32, 32]},
    ),
    "z-image": Small(
        "ZImage",
        {
            **_LUMINA,
            "image_model": "lumina2",
            "dim": 256,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
    "qwen-image": Small(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "joint_attention_dim": 128,
        },
        frames=1,
    ),
    "krea2": Small(
        "Krea2",
        {
            "image_model": "krea2",
            "features": 256,
            "heads": 2,
            "kvheads": 1,
            "layers": 2,
            "txtlayers": 2,
            "txtdim": 128,
            "txtheads": 1,
            "txtkvheads": 1,
        },
        context=256,
        frames=1,
    ),
    "anima": Small(
        "Anima",
        {**_COSMOS, "image_model": "anima", "crossattn_emb_channels": 1024},
        frames=1,
        context=1024,
        options=_t5_ids,
    ),
    "wan": Small(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 256,
            "ffn_dim": 512,
            "num_heads": 2,
            "num_layers": 2,
            "text_dim": 128,
            "in_dim": 16,
            "out_dim": 16,
        },
        frames=3,
    ),
    "hidream": Small(
        "HiDream",
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "caption_channels": [128, 128],
            "axes_dims_rope": [64, 32, 32],
            "llama_layers": [0, 1],
        },
        options=_llama,
    ),
    "hunyuan-video": Small(
        "HunyuanVideo",
        {
            **{name: value for name, value in _FLUX.items() if name != "txt_ids_dims"},
            "image_model": "hunyuan_video",
            "patch_size": [1, 2, 2],
            "theta": 256,
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 256,
            "context_in_dim": 128,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        options=_pooled(256, guidance=6.0),
        frames=3,
    ),
    "cosmos-predict2": Small("CosmosT2IPredict2", {**_COSMOS, "image_model": "cosmos_predict2"}, frames=1),
    "cogvideox": Small(
        "CogVideoX_T2V",
        {
            "image_model": "cogvideox",
            "num_attention_heads": 4,
            "time_embed_dim": 128,
            "text_embed_dim": 128,
            "num_layers": 2,
            "use_rotary_positional_embeddings": True,
        },
        frames=3,
    ),
    "ltxv": Small(
        "LTXV",
        {
            "image_model": "ltxv",
            "cross_attention_dim": 256,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "caption_channels": 128,
            "num_layers": 2,
        },
        channels=128,
        options=lambda generator: {"attention_mask": torch.ones(1, 77)},
        frames=2,
        size=(8, 8),
    ),
    "pixeldit": Small(
        "PixelDiTT2I",
        {
            "image_model": "pixeldit_t2i",
            "num_groups": 2,
            "hidden_size": 128,
            "pixel_attn_hidden_size": 128,
            "pixel_num_groups": 2,
            "patch_depth": 2,
            "pixel_depth": 1,
            "txt_embed_dim": 128,
            "txt_max_length": 77,
        },
        channels=3,
        size=(64, 64),
    ),
    "hidream-o1": Small(
        "HiDreamO1",
        {
            "image_model": "hidream_o1",
            "text_config_overrides": {
                "vocab_size": 151936,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 128,
            },
            "vision_config_overrides": {
                "hidden_size": 64,
                "num_heads": 2,
                "intermediate_size": 128,
                "depth": 1,
                "deepstack_visual_indexes": (),
            },
        },
        channels=3,
        options=_text_ids,
        size=(128, 128),
    ),
    "joyimage": Small(
        "JoyImage",
        {
            "image_model": "joyimage",
            "hidden_size": 256,
            "num_attention_heads": 2,
            "text_dim": 128,
            "num_layers": 2,
            "rope_dim_list": [16, 56, 56],
            "theta": 10000,
        },
        frames=1,
    ),
    "ace-step": Small(
        "ACEStep15",
        {
            "audio_model": "ace1.5",
            "hidden_size": 128,
            "text_hidden_dim": 128,
            "num_dit_layers": 2,
            "num_lyric_layers": 1,
            "num_timbre_layers": 1,
            "num_tokenizer_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 64,
            "intermediate_size": 256,
            "fsq_dim": 128,
            "encoder_hidden_size": 128,
            "encoder_intermediate_size": 256,
            "encoder_num_heads": 2,
        },
        channels=64,
        options=_lyrics,
        size=(40,),
    ),
}


def _seconds(*names: str) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    """Embedders of the length of a sound."""

    def made(generator: torch.Generator) -> dict[str, torch.Tensor]:
        found = {}
        for name in names:
            at = f"conditioner.conditioners.{name}.embedder.embedding"
            found |= {
                f"{at}.0.weights": torch.randn(128, generator=generator),
                f"{at}.1.weight": 0.05 * torch.randn(768, 257, generator=generator),
                f"{at}.1.bias": 0.05 * torch.randn(768, generator=generator),
            }
        return found

    return made


def _two_texts(generator: torch.Generator) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones(1, 77),
        "conditioning_mt5xl": torch.randn(1, 77, 128, generator=generator),
        "attention_mask_mt5xl": torch.ones(1, 77),
    }


def _lyric_tokens(generator: torch.Generator) -> dict[str, Any]:
    return {"conditioning_lyrics": torch.randint(1, 6681, (1, 12), generator=generator)}


def _all_ones(generator: torch.Generator) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, 77, dtype=torch.long)}


def _low_quality(generator: torch.Generator) -> dict[str, Any]:
    return {"lq_latent": torch.randn(1, 16, 2, 2, generator=generator), "degrade_sigma": torch.zeros(1)}


def _of_wan(model_type: str, channels: int = 16, **settings: Any) -> dict[str, Any]:
    return {**FAMILIES["wan"].settings, "model_type": model_type, "in_dim": channels, **settings}


def _of_hunyuan(channels: int, patch: list[int], **settings: Any) -> dict[str, Any]:
    own = {"patch_size": patch, "in_channels": channels, "vec_in_dim": None, "guidance_embed": False}
    axes = [64, 64] if len(patch) == 2 else [16, 56, 56]
    return {**FAMILIES["hunyuan-video"].settings, **own, "axes_dim": axes, **settings}


def _without(name: str, *left_out: str, **settings: Any) -> dict[str, Any]:
    return {**{key: value for key, value in FAMILIES[name].settings.items() if key not in left_out}, **settings}


_NARROW: dict[str, Any] = {**FAMILIES["sdxl"].settings, "model_channels": 64, "context_dim": 128}
_VIDEO_UNET: dict[str, Any] = {
    **_NARROW,
    "in_channels": 8,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
}
_COSMOS_1: dict[str, Any] = {
    **{name: value for name, value in _COSMOS.items() if not name.startswith(("rope", "pos_emb_learnable"))},
    "image_model": "cosmos",
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "pos_emb_learnable": False,
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_KANDINSKY: dict[str, Any] = {
    "image_model": "kandinsky5",
    "in_text_dim": 128,
    "in_text_dim2": 256,
    "time_dim": 64,
    "model_dim": 256,
    "ff_dim": 512,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (32, 48, 48),
}
_OMNIGEN: dict[str, Any] = {
    "image_model": "omnigen2",
    "hidden_size": 240,
    "in_channels": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "axes_dim_rope": [40, 40, 40],
    "axes_lens": [1024, 1664, 1664],
    "timestep_scale": 1000.0,
}
_PIXART: dict[str, Any] = {
    "hidden_size": 144,  # a third for each side, and for their ratio
    "num_heads": 2,
    "depth": 2,
    "in_channels": 4,
    "caption_channels": 128,
    "model_max_length": 77,
    "input_size": 32,
    "pe_interpolation": 1,
}
_HYDIT: dict[str, Any] = {
    "hidden_size": 256,
    "depth": 2,
    "num_heads": 2,
    "text_states_dim": 128,
    "text_states_dim_t5": 128,
    "text_len_t5": 77,
}
_SOUND: dict[str, Any] = {
    "audio_model": "dit1.0",
    "embed_dim": 128,
    "depth": 2,
    "num_heads": 2,
    "project_cond_tokens": True,
}
_SHAPES: dict[str, Any] = {
    "image_model": "hunyuan3d2",
    "in_channels": 64,
    "context_in_dim": 128,
    "hidden_size": 128,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
}

FAMILIES |= {
    "sd2": Small("SD20", {**_NARROW, "num_classes": None, "adm_in_channels": None}, channels=4),
    "sd2-unclip-l": Small("SD21UnclipL", {**_NARROW, "adm_in_channels": 1536}, channels=4),
    "sd2-unclip-h": Small("SD21UnclipH", {**_NARROW, "adm_in_channels": 2048}, channels=4),
    "sd1-ip2p": Small("SD15_instructpix2pix", {**FAMILIES["sd1"].settings, "in_channels": 8}, channels=4, context=768),
    "sdxl-ip2p": Small("SDXL_instructpix2pix", {**_NARROW, "in_channels": 8}, channels=4, options=_pooled(1280)),
    "sdxl-refiner": Small("SDXLRefiner", {**_NARROW, "adm_in_channels": 2560}, channels=4, options=_pooled(1280)),
    "ssd-1b": Small("SSD1B", _NARROW, channels=4, options=_pooled(1280)),
    "vega": Small("Segmind_Vega", _NARROW, channels=4, options=_pooled(1280)),
    "koala-700m": Small("KOALA_700M", _NARROW, channels=4, options=_pooled(1280)),
    "koala-1b": Small("KOALA_1B", _NARROW, channels=4, options=_pooled(1280)),
    "lotus": Small("LotusD", {**_NARROW, "adm_in_channels": 4}, channels=4),
    "sd-x4": Small(
        "SD_X4Upscaler",
        {
            **_NARROW,
            "in_channels": 7,
            "num_classes": 1000,
            "adm_in_channels": None,
            "disable_self_attentions": [True, False],
        },
        channels=4,
    ),
    "zero123": Small(
        "Stable_Zero123",
        {**_NARROW, "in_channels": 8, "num_classes": None, "adm_in_channels": None, "context_dim": 768},
        channels=4,
        context=772,
        beside=lambda generator: {
            f"cc_projection.{name}": 0.03 * torch.randn(shape, generator=generator)
            for name, shape in {"weight": (768, 772), "bias": (768,)}.items()
        },
    ),
    "svd": Small("SVD_img2vid", {**_VIDEO_UNET, "adm_in_channels": 768}, channels=4),
    "sv3d-u": Small("SV3D_u", {**_VIDEO_UNET, "adm_in_channels": 256}, channels=4),
    "sv3d-p": Small("SV3D_p", {**_VIDEO_UNET, "adm_in_channels": 1280}, channels=4),
    "cascade-c": Small(
        "Stable_Cascade_C",
        {
            "stable_cascade_stage": "c",
            "c_cond": 64,
            "c_hidden": [64, 64],
            "nhead": [2, 2],
            "blocks": [[1, 1], [1, 1]],
            "c_clip_text": 128,
            "c_clip_text_pooled": 128,
        },
        options=_pooled(128),
    ),
    "cascade-b": Small(
        "Stable_Cascade_B",
        {
            "stable_cascade_stage": "b",
            "c_cond": 64,
            "c_hidden": [32, 32, 64, 64],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "c_clip": 128,
        },
        channels=4,
        options=_pooled(128),
        size=(32, 32),
    ),
    "stable-audio": Small(
        "StableAudio",
        {**_SOUND, "io_channels": 64},
        channels=64,
        context=768,
        beside=_seconds("seconds_start", "seconds_total"),
        size=(40,),
    ),
    "stable-audio-3": Small(
        "StableAudio3",
        {
            **_SOUND,
            "io_channels": 256,
            "global_cond_dim": 768,
            "global_cond_shared_embed": True,
            "global_cond_type": "adaLN",
            "timestep_features_type": "learned",
            "local_add_cond_dim": 257,
        },
        channels=256,
        context=768,
        beside=_seconds("seconds_total"),
        size=(40,),
    ),
    "ace-step-1": Small(
        "ACEStep",
        {"audio_model": "ace", "num_layers": 2, "num_attention_heads": 2, "text_embedding_dim": 128},
        channels=8,
        options=_lyric_tokens,
        size=(16, 20),
    ),
    "auraflow": Small(
        "AuraFlow",
        {
            "dim": 256,
            "n_layers": 3,
            "n_double_layers": 1,
            "n_heads": 2,
            "global_conddim": 256,
            "cond_seq_dim": 128,
        },
        channels=4,
    ),
    "pixart-sigma": Small(
        "PixArtSigma", {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False}, channels=4, size=(64, 64)
    ),
    "pixart-alpha": Small(
        "PixArtAlpha",
        {**_PIXART, "image_model": "pixart_alpha", "micro_condition": True},
        channels=4,
        options=lambda generator: {"width": 512, "height": 512},
        size=(64, 64),
    ),
    "hunyuan-dit": Small("HunyuanDiT", {**_HYDIT, "image_model": "hydit"}, channels=4, options=_two_texts),
    "hunyuan-dit-1": Small(
        "HunyuanDiT1",
        {**_HYDIT, "image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        channels=4,
        options=_two_texts,
    ),
    "flux-inpaint": Small(
        "FluxInpaint", _without("flux", in_channels=96), context=768, options=_pooled(256, guidance=3.5)
    ),
    "flux-schnell": Small("FluxSchnell", _without("flux", guidance_embed=False), context=768, options=_pooled(256)),
    "longcat-image": Small(
        "LongCatImage",
        _without("flux", guidance_embed=False, vec_in_dim=None, context_in_dim=128, txt_ids_dims=[1, 2]),
    ),
    "mochi": Small(
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "num_heads": 2,
            "hidden_size_x": 256,
            "hidden_size_y": 128,
            "mlp_ratio_x": 48.0,  # whose inner width is checked
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "posenc_preserve_area": True,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 128,
            "t5_token_length": 77,
        },
        channels=12,
        options=_all_ones,
        frames=2,
    ),
    "hunyuan-video-i2v": Small(
        "HunyuanVideoI2V",
        {**FAMILIES["hunyuan-video"].settings, "in_channels": 33},
        options=_pooled(256, guidance=6.0),
        frames=3,
    ),
    "skyreels-i2v": Small(
        "HunyuanVideoSkyreelsI2V",
        {**FAMILIES["hunyuan-video"].settings, "in_channels": 32},
        options=_pooled(256, guidance=6.0),
        frames=3,
    ),
    "hunyuan-video-15": Small(
        "HunyuanVideo15",
        _of_hunyuan(
            65, [1, 1, 1], out_channels=32, vision_in_dim=1152, meanflow_sum=True, use_cond_type_embedding=True
        ),
        channels=32,
        options=_pooled(256),
        frames=3,
    ),
    "hunyuan-video-15-sr": Small(
        "HunyuanVideo15_SR_Distilled",
        _of_hunyuan(
            98, [1, 1, 1], out_channels=32, vision_in_dim=1152, meanflow_sum=True, use_cond_type_embedding=True
        ),
        channels=32,
        options=_pooled(256),
        frames=3,
    ),
    "hunyuan-image": Small("HunyuanImage21", _of_hunyuan(64, [1, 1], out_channels=64), channels=64),
    "cosmos-1": Small("CosmosT2V", _COSMOS_1, frames=2),
    "cosmos-1-i2v": Small("CosmosI2V", {**_COSMOS_1, "in_channels": 17}, frames=2),
    "cosmos-predict2-i2v": Small(
        "CosmosI2VPredict2", {**_COSMOS, "image_model": "cosmos_predict2", "in_channels": 17}, frames=2
    ),
    "z-image-pixel": Small(
        "ZImagePixelSpace",
        _without(
            "z-image",
            image_model="zimage_pixel",
            patch_size=8,
            in_channels=3,
            decoder_in_channels=192,
            decoder_hidden_size=128,
            decoder_num_res_blocks=1,
            decoder_max_freqs=4,
        ),
        channels=3,
        size=(64, 64),
    ),
    "pid": Small(
        "PiD",
        _without("pixeldit", image_model="pid", lq_hidden_dim=64, lq_num_res_blocks=1, rope_ref_h=64, rope_ref_w=64),
        channels=3,
        options=_low_quality,
        size=(64, 64),
    ),
    "wan-2.2-5b": Small("WAN22_T2V", _of_wan("t2v", 48, out_dim=48), channels=48, frames=3),
    "wan-causal": Small("WAN21_CausalAR_T2V", _of_wan("t2v"), frames=3),
    "wan-i2v": Small("WAN21_I2V", _of_wan("i2v", 36), frames=3),
    "wan-fun-control": Small("WAN21_FunControl2V", _of_wan("i2v", 48), frames=3),
    "wan-vace": Small("WAN21_Vace", _of_wan("vace", vace_layers=1, vace_in_dim=96), frames=3),
    "wan-camera": Small("WAN21_Camera", _of_wan("camera", 32), frames=3),
    "wan-2.2-camera": Small("WAN22_Camera", _of_wan("camera_2.2", 36), frames=3),
    "wan-s2v": Small("WAN22_S2V", _of_wan("s2v", audio_inject_layers=[0]), frames=3),
    "wan-humo": Small("WAN21_HuMo", _of_wan("humo"), frames=3),
    "wan-animate": Small("WAN22_Animate", _of_wan("animate", 36), frames=3),
    "wan-animate-2": Small("WAN_Animate2", _of_wan("animate2", 36), frames=3),
    "wan-flow-rvs": Small("WAN21_FlowRVS", _of_wan("t2v"), frames=3),
    "wan-scail": Small("WAN21_SCAIL", _of_wan("scail", 20), frames=3),
    "wan-scail-2": Small("WAN21_SCAIL2", _of_wan("scail2", 20), frames=3),
    "wan-dancer": Small("WAN22_WanDancer", _of_wan("wandancer", 36, audio_inject_layers=[0]), frames=3),
    "hunyuan-3d": Small("Hunyuan3Dv2", _SHAPES, channels=64, size=(40,)),
    "hunyuan-3d-mini": Small("Hunyuan3Dv2mini", _SHAPES, channels=64, size=(40,)),
    "hunyuan-3d-2.1": Small(
        "Hunyuan3Dv2_1",
        {
            "image_model": "hunyuan3d2_1",
            "hidden_size": 128,
            "context_dim": 128,
            "depth": 3,
            "num_heads": 2,
            "num_moe_layers": 1,
            "num_experts": 2,
            "guidance_cond_proj_dim": None,
        },
        channels=64,
        size=(40,),
    ),
    "chroma-radiance": Small(
        "ChromaRadiance",
        _without(
            "chroma",
            image_model="chroma_radiance",
            in_channels=3,
            out_channels=3,
            patch_size=16,
            nerf_hidden_size=32,
            nerf_mlp_ratio=2,
            nerf_depth=1,
            nerf_max_freqs=4,
            nerf_tile_size=512,
            nerf_final_head_type="conv",
            nerf_embedder_dtype=torch.float32,
            use_x0=False,
            use_sequential_txt_ids=False,
        ),
        channels=3,
        size=(64, 64),
    ),
    "omnigen2": Small("Omnigen2", {**_OMNIGEN, "text_feat_dim": 128}, options=_all_ones),
    "boogu": Small(
        "Boogu",
        {**_OMNIGEN, "image_model": "boogu", "num_double_stream_layers": 1, "instruction_feat_dim": 128},
        options=_all_ones,
    ),
    "mage-flow": Small(
        "MageFlow",
        {"image_model": "mage_flow", "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 128},
        channels=128,
    ),
    "ideogram4": Small(
        "Ideogram4",
        {
            "image_model": "ideogram4",
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "intermediate_size": 256,
            "adaln_dim": 64,
            "llm_features_dim": 128,
        },
        channels=128,
    ),
    "lens": Small(
        "Lens",
        {
            "image_model": "lens",
            "num_layers": 2,
            "num_attention_heads": 2,
            "enc_hidden_dim": 128,
            "multi_layer_encoder_feature": False,
            "selected_layer_index": (0,),
        },
        channels=128,
        options=_all_ones,
    ),
    "kandinsky-5": Small("Kandinsky5", {**_KANDINSKY, "visual_embed_dim": 132}, options=_pooled(256), frames=2),
    "kandinsky-5-image": Small(
        "Kandinsky5Image", {**_KANDINSKY, "visual_embed_dim": 64}, options=_pooled(256), frames=1
    ),
    "ernie-image": Small(
        "ErnieImage",
        {
            "image_model": "ernie",
            "hidden_size": 256,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 512,
            "text_in_dim": 128,
        },
        channels=128,
    ),
    "cogvideox-i2v": Small("CogVideoX_I2V", {**FAMILIES["cogvideox"].settings, "in_channels": 32}, frames=3),
    "cogvideox-inpaint": Small("CogVideoX_Inpaint", {**FAMILIES["cogvideox"].settings, "in_channels": 48}, frames=3),
}
