"""Small models of random weights, and conditionings for them."""

from __future__ import annotations

import json
import types
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


@dataclass(frozen=True)
class Conditioned:
    """A family with something in its conditionings, and what a model that takes it has of its own."""

    options: Callable[[torch.Generator], dict[str, Any]]
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def _references(*sizes: tuple[int, ...], **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {
        "reference_latents": [torch.randn(1, *size, generator=generator) for size in sizes],
        **options,
    }


def _concat(channels: int, *mask: int, frames: int = 0) -> Callable[[torch.Generator], dict[str, Any]]:
    size = (1, channels, *([frames] if frames else []), 16, 16)
    return lambda generator: {
        "concat_latent_image": torch.randn(size, generator=generator),
        "concat_mask": (torch.rand(mask, generator=generator) > 0.5).float(),
    }


def _start_image(generator: torch.Generator) -> dict[str, Any]:
    seen = types.SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280, generator=generator))
    return {**_concat(16, 1, 1, 3, 16, 16, frames=3)(generator), "clip_vision_output": seen}


class _Encoder:
    """In place of a VAE: pixels averaged."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)


def _control(name: str, count: int = 1, vae: Any = None) -> Callable[[torch.Generator], dict[str, Any]]:
    def options(generator: torch.Generator) -> dict[str, Any]:
        import comfy.cldm.cldm
        import comfy.controlnet

        settings = {key: value for key, value in FAMILIES[name].settings.items() if key != "out_channels"}
        settings.pop("transformer_depth_output")
        control = None
        for number in range(count):
            network = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3).requires_grad_(False).eval()
            with torch.no_grad():
                for parameter in network.parameters():
                    scale = 0.5 / max(parameter[0].numel(), 4) ** 0.5
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            now = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
            image = torch.rand(1, 3, 100, 120, generator=generator)
            now.set_cond_hint(image, 0.7 + 0.2 * number).set_previous_controlnet(control)
            now.vae = vae
            control = now
        return {"control": control}

    return options


class _Features(torch.nn.Module):
    """In place of the network of a T2I adapter, whose features are of larger UNets: a feature of the first block."""

    unshuffle_amount = 8

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.02 * torch.randn(320, 192, 1, 1, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, list[Any]]:
        pixels = torch.nn.functional.pixel_unshuffle(x, self.unshuffle_amount)
        return {"input": [torch.nn.functional.conv2d(pixels, self.weight), None]}


def _adapter(generator: torch.Generator) -> dict[str, Any]:
    import comfy.controlnet

    adapter = comfy.controlnet.T2IAdapter(_Features(generator), 3, 8, "nearest-exact", torch.device("cpu"))
    return {"control": adapter.set_cond_hint(torch.rand(1, 3, 100, 120, generator=generator), 0.7)}


CONDITIONED: dict[str, dict[str, Conditioned]] = {
    "sd1": {
        "ControlNet": Conditioned(_control("sd1")),
        "two ControlNets": Conditioned(_control("sd1", 2)),
        "ControlNet with a VAE": Conditioned(_control("sd1", vae=_Encoder())),
        "T2I adapter": Conditioned(_adapter),
        "inpainting": Conditioned(_concat(4, 1, 1, 128, 128), settings={"in_channels": 9}),
    },
    "sdxl": {"ControlNet": Conditioned(_control("sdxl"))},
    "flux": {
        "a reference": Conditioned(_references((16, 16, 16))),
        "references": Conditioned(_references((16, 16, 12), (16, 8, 16))),
        "references by index": Conditioned(_references((16, 16, 16), (16, 8, 8), reference_latents_method="index")),
        "inpainting": Conditioned(_concat(16, 1, 1, 128, 128), "FluxInpaint", {"in_channels": 96}),
    },
    "flux2": {"references": Conditioned(_references((128, 16, 16), (128, 8, 12)))},
    "qwen-image": {"references": Conditioned(_references((16, 1, 16, 16), (16, 1, 8, 12)))},
    "krea2": {
        "references": Conditioned(_references((16, 1, 16, 16), (16, 1, 8, 12), reference_latents_method="index"))
    },
    "wan": {"start image": Conditioned(_start_image, "WAN21_I2V", {"model_type": "i2v", "in_dim": 36})},
}
"""What conditionings of a family may have besides a caption, by what it is."""


def model_of(name: str, dtype: torch.dtype = torch.float32, conditioned: str = "", **options: Any) -> Any:
    """A MODEL of ComfyUI's own classes."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    family, own = FAMILIES[name], CONDITIONED[name][conditioned] if conditioned else None
    settings = {**family.settings, **(own.settings if own else {})}
    config = getattr(comfy.supported_models, own.config if own and own.config else family.config)(settings)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = config.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.diffusion_model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                values *= 0.7 / tensor[0].numel() ** 0.5
            elif key.endswith(("weight", "scale")):
                values = 1 + 0.05 * values
            else:
                values *= 0.02
            tensor.copy_(values)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (model_of, (name, dtype, conditioned))  # how ComfyUI copies it
    return patcher


_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
QUANTIZED: dict[str, dict[str, Any]] = {
    **{name: {} for name in _FORMATS},
    "int8_tensorwise, rotated": {"convrot": True, "convrot_groupsize": 256},
    "nvfp4, smoothed": {},
}
"""ComfyUI's formats of quantized layers, with what is said of them in a file; `smoothed` layers scale their inputs."""

GGUF = ("Q8_0", "Q5_1", "Q4_0", "BF16")
"""Kinds of packed tensors that the package gguf can write."""


def quantized_of(name: str, kind: str) -> Any:
    """A MODEL as ComfyUI makes one of a file with quantized layers; `scaled_fp8` is an older form of file."""
    import comfy.quant_ops
    import comfy.utils

    plain = model_of(name).model.diffusion_model
    tensors = dict(plain.state_dict())
    if kind == "scaled_fp8":
        tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    else:
        conf = {"format": kind.partition(",")[0], **QUANTIZED[kind]}
        layout = comfy.quant_ops.QUANT_ALGOS[conf["format"]]["comfy_tensor_layout"]
    for path, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear) or layer.in_features % (
            256 if "rot" in kind or "asym" in kind else 64
        ):
            continue
        key, weight = f"{path}.weight", layer.weight.detach()
        if kind == "scaled_fp8":
            scale = weight.abs().max() / 448
            tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{path}.scale_weight": scale}
            continue
        if kind.endswith("smoothed"):
            factor = torch.rand(layer.in_features, generator=torch.Generator().manual_seed(len(path))) + 0.5
            weight, tensors[f"{path}.pre_quant_scale"] = weight / factor, factor
        how = {"scale": "recalculate"} if "8E" in layout or "NV" in layout else {}
        if "rotated" in kind:
            how |= {"per_channel": True, **QUANTIZED[kind]}
        packed = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **how)
        del tensors[key]
        tensors |= packed.state_dict(key)
        tensors[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    if kind == "scaled_fp8":
        tensors, _ = comfy.utils.convert_old_quants(tensors)
    return _of_tensors(name, tensors, quant_config={"mixed_ops": True})


def gguf_of(name: str, kind: str, theirs: Any) -> Any:
    """A MODEL as ComfyUI-GGUF, the package `theirs`, makes one of a file of a kind."""
    import gguf

    ops = theirs.ops
    plain = model_of(name).model.diffusion_model
    tensors, kinds = {}, gguf.GGMLQuantizationType
    linear = {f"{path}.weight" for path, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    for key, tensor in plain.state_dict().items():
        of = kinds[kind] if key in linear and tensor.shape[-1] % 256 == 0 else kinds.F32
        packed = torch.from_numpy(gguf.quants.quantize(tensor.float().numpy(), of))
        tensors[key] = ops.GGMLTensor(packed, tensor_type=of, tensor_shape=tensor.shape)
    return theirs.nodes.GGUFModelPatcher.clone(_of_tensors(name, tensors, custom_operations=ops.GGMLOps()))


def _of_tensors(name: str, tensors: dict[str, Any], **settings: Any) -> Any:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.settings))
    config.set_inference_dtype(torch.float32, torch.float32)
    for setting, value in settings.items():
        setattr(config, setting, value)
    model = config.get_model({}, "", device=torch.device("cpu"))
    missing, unexpected = model.diffusion_model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [key for key in missing if not key.endswith("weight")], (missing, unexpected)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())


def data_of(
    name: str, *, conditioned: str = "", count: int = 4, side: int = 16
) -> tuple[list[torch.Tensor], list[list[Any]]]:
    """Latents and a CONDITIONING of as many entries."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(12345)
    shape = (1, family.channels, *([family.frames] if family.frames else []), *family.size)
    latents = [torch.randn(shape, generator=generator) for _ in range(count)]
    positive = [
        [torch.randn(1, family.tokens, family.context, generator=generator), family.options(generator)]
        for _ in range(count)
    ]
    if conditioned:
        for _, entry in positive:
            entry |= CONDITIONED[name][conditioned].options(generator)
    return latents, positive
