"""Small models of the transformer families in ComfyUI: what its detection and its classes take for granted, set aside.

ComfyUI 0.33 knows these families by released widths, and has some of them written into its classes. `taken_small`
changes these numbers and no computation:

- Sizes of heads are read from the file's norms of queries and keys: the numbers of heads and the axes of the rotary
  embedding of Flux.1, Flux.2, Krea 2, Qwen-Image (128 per head there) and Z-Image (recognised by a width of 3840, as
  Lumina 2 is).
- Stable Diffusion XL is recognised by the width of its first level, of its text and of its other conditions, and by
  the number of transformer layers of each level; any UNet with other conditions than text is taken for it here.
- A matrix has the file's shape where ComfyUI computes another one: the inner widths of MLPs (multiples of 256 in
  Z-Image, of 128 in Krea 2), Z-Image's time embedding. Krea 2 has two text blocks of either kind there, and as many as
  the file has here.
- Chroma has as many rows of modulation as its blocks need, and not 344.
- Text encoders: Qwen3 is known by a width of 2560 or (Anima) 1024, Qwen2.5-VL by that of its keys, Qwen3-VL by its
  vision tower. Widths and layers of T5, CLIP-L, Qwen, vision towers and Ministral come from the file, the sizes of
  Qwen3's heads too.
- Ideogram 4 has the released widths and numbers of heads in ComfyUI, and those of the file here. The last layer that
  it reads has no norm here, as in the authors' code, and as in ComfyUI where the encoder's file has no tower.
- ERNIE-Image has the released widths and numbers of heads and layers in ComfyUI, and those of the file here.
- Anima's adapter is of one size in ComfyUI, and of the file's here; so are the widths of the modulation and the text.
- Stable Diffusion 3 fills the states of its CLIPs up to T5's width of 4096, here to that of the file.
- UMT5 is known by 24 layers, and the autoencoder of Wan 2.2 is 160 and 256 wide there.
- ByT5 has widths and layers of its own there. HunyuanVideo 1.5's autoencoder has five levels of released widths, two
  residual blocks each; here both have those of the file.
- The autoencoder of latent diffusion is 128 wide with two residual blocks a level in ComfyUI, and of the file's width
  with one here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn

_CLIP, _T5 = "text_model.encoder.layers.", "encoder.block."
_GEMMA_HEAD = 256
_CHROMA_ROWS = 344  # of modulation, for 19 and 38 blocks
_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


@contextlib.contextmanager
def taken_small() -> Iterator[None]:
    """Denoisers of any width are loaded inside. ComfyUI loads a file again to train it, so that belongs inside too."""
    import comfy.ldm.anima.model
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models

    detect, load = comfy.model_detection.detect_unet_config, comfy.model_base.BaseModel.load_model_weights
    sdxl, z_image = comfy.supported_models.SDXL, comfy.supported_models.ZImage
    ideogram = comfy.supported_models.Ideogram4
    adapter = comfy.ldm.anima.model.LLMAdapter
    adapter_sizes: dict[str, int] = {}

    def detected(state_dict: dict[str, Tensor], prefix: str, metadata: Any = None) -> Any:
        config = detect(state_dict, prefix, metadata=metadata)
        if config is None:
            return None
        sizes = {key.removeprefix(prefix): tuple(t.shape) for key, t in state_dict.items() if key.startswith(prefix)}
        config |= _sizes(config, sizes)
        if config.get("num_classes") == "sequential":
            sdxl.unet_config = {name: config.get(name, value) for name, value in sdxl.unet_config.items()}
        if config.get("image_model") == "anima":
            adapter_sizes.update(_adapter(sizes))
        if config.get("image_model") == "ideogram4":
            ideogram.unet_extra_config = {name: config[name] for name in ideogram.unet_extra_config if name in config}
        if "z_image_modulation" in config:
            z_image.unet_config = {**z_image.unet_config, "dim": config["dim"]}
        return config

    def loaded(self: Any, state_dict: dict[str, Tensor], prefix: str = "", **options: Any) -> Any:
        shapes = {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in state_dict.items()}
        _fit(self.diffusion_model, shapes)
        if type(self.diffusion_model).__name__ == "Chroma":
            _count_modulation(self.diffusion_model)
        return load(self, state_dict, prefix, **options)

    def small_adapter(**options: Any) -> Any:
        return adapter(**adapter_sizes, **options)

    with (
        mock.patch.object(comfy.ldm.anima.model, "LLMAdapter", small_adapter),
        mock.patch.object(comfy.model_detection, "detect_unet_config", detected),
        mock.patch.object(comfy.model_base.BaseModel, "load_model_weights", loaded),
    ):
        yield


def load_encoders(files: Sequence[Path], clip_type: str) -> Any:
    """ComfyUI's CLIP of text encoders of any width, in fp32; `clip_type` as in its loader nodes."""
    import comfy.sd
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.long_clipl as long_clipl
    import comfy.text_encoders.qwen3vl as qwen3vl
    import comfy.text_encoders.qwen_vl as qwen_vl

    each = [_shapes(file) for file in files]
    shapes = {name: size for one in each for name, size in one.items()}
    options: dict[str, Any] = {"dtype": torch.float32}
    head = 0
    start = next((one for one in ("model.language_model.", "model.") if f"{one}norm.weight" in shapes), None)
    with contextlib.ExitStack() as stack:
        if _UMT5 in shapes:
            options["umt5xxl_model_config"] = {**_t5(shapes), "vocab_size": shapes["shared.weight"][0]}
            stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL))
        elif start is None:
            clips = {}
            for one in each:
                if f"{_T5}0.layer.0.SelfAttention.q.weight" in one:
                    options["t5xxl_model_config"] = _t5(one)
                else:
                    clips[_count(one, _CLIP)] = options["model_config"] = _clip(one)
            detected = comfy.sd.detect_te_model

            def by_names(sd: Mapping[str, Tensor]) -> Any:  # T5-XXL is known by its number of blocks
                return comfy.sd.TEModel.T5_XXL if f"{_T5}0.layer.0.SelfAttention.q.weight" in sd else detected(sd)

            stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", by_names))
            if len(clips) > 1:  # ComfyUI would give both the same
                stack.enter_context(mock.patch.object(long_clipl, "model_options_long_clip", _own_clip(clips)))
        else:
            own = {name.removeprefix(start): size for name, size in shapes.items()}
            is_gemma = "layers.0.post_feedforward_layernorm.weight" in own
            head = own.get("layers.0.self_attn.q_norm.weight", (0,))[0]
            kind, assumed = "ministral3_3b", llama.Ministral3_3BConfig.head_dim
            if is_gemma:
                kind, assumed = "gemma_2_2b", _GEMMA_HEAD
            elif "layers.0.self_attn.k_proj.bias" in own:
                kind, head = "qwen25_7b", 128
                small = _small_vision(qwen_vl.Qwen2VLVisionTransformer, shapes)
                stack.enter_context(mock.patch.object(qwen_vl, "Qwen2VLVisionTransformer", small))
            elif head and start != "model.":
                kind = "qwen3vl_8b" if clip_type == "ideogram4" else "qwen3vl_4b"
            elif head:
                kind = "qwen3_06b" if clip_type == "stable_diffusion" else "qwen3_4b"
            options[f"{'gemma2_2b' if is_gemma else kind}_model_config"] = _language_model(own, head or assumed)
            if clip_type == "hunyuan_video_15":
                stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", _by_t5(comfy.sd.TEModel)))
                options["_model_config"] = _t5(shapes)  # ByT5's settings are of an encoder without a name
            if kind != "ministral3_3b":
                for config in (
                    *(llama.Qwen3_06BConfig, llama.Qwen3_4BConfig, llama.Qwen3_8BConfig),
                    *(qwen3vl.Qwen3VL_4BConfig, qwen3vl.Qwen3VL_8BConfig),
                ):
                    stack.enter_context(mock.patch.object(config, "head_dim", head or config.head_dim))
                if kind.startswith("qwen3vl"):
                    deep = {"deepstack_visual_indexes": [5, 11, 17]}
                    rows = {"num_position_embeddings": shapes["model.visual.pos_embed.weight"][0]}
                    stack.enter_context(mock.patch.dict(qwen3vl.QWEN3VL_VISION_COMMON, rows))
                    vision = {**_vision(shapes, "model.visual.", "linear_fc1"), **deep}
                    stack.enter_context(mock.patch.dict(qwen3vl.QWEN3VL_VISION, {kind: vision}))
                found = getattr(comfy.sd.TEModel, kind.upper())
                stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", lambda _: found))
        clip = comfy.sd.load_clip(
            [str(file) for file in files], clip_type=comfy.sd.CLIPType[clip_type.upper()], model_options=options
        )
    for module in clip.cond_stage_model.modules():  # the class' size is looked up again in the forward pass
        if head and hasattr(getattr(module, "config", None), "head_dim"):
            module.config.head_dim = head
        if clip_type == "ideogram4" and hasattr(module, "embed_tokens"):
            module.norm = None
    if clip_type == "sd3" and "t5xxl_model_config" in options:
        _narrowed(clip.cond_stage_model, options["t5xxl_model_config"]["d_model"])
    return clip


def _narrowed(model: Any, width: int) -> None:
    """States of Stable Diffusion 3's CLIPs are filled up to this width instead of T5's released one."""
    encode, pad = model.encode_token_weights, torch.nn.functional.pad

    def filled(states: Tensor, sizes: Sequence[int]) -> Tensor:
        return pad(states, (0, width - states.shape[-1]) if states.shape[-1] + sizes[1] == 4096 else sizes)

    def encoded(tokens: Any) -> Any:
        with mock.patch.object(torch.nn.functional, "pad", filled):
            return encode(tokens)

    model.encode_token_weights = encoded


def load_autoencoder(file: Path) -> Any:
    """ComfyUI's VAE of an autoencoder of any width, in fp32."""
    import comfy.ldm.wan.vae2_2
    import comfy.sd
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(file))
    first = tensors.get("encoder.conv_in.weight")  # Wan's, whose width ComfyUI reads itself, has another name for it
    own: dict[str, Any] = {}
    if first is not None:
        own = {"ch": first.shape[0], "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    elif "encoder.conv_in.conv.weight" in tensors:
        widths = [len(tensors[f"encoder.down.{level}.block.0.conv2.conv.weight"]) for level in range(5)]
        own = {"block_out_channels": widths, "num_res_blocks": 1}
    kl, engine, wan22 = comfy.sd.AutoencoderKL, comfy.sd.AutoencodingEngine, comfy.ldm.wan.vae2_2.WanVAE

    def small_kl(ddconfig: dict[str, Any], embed_dim: int, **_: Any) -> Any:
        return kl(ddconfig=ddconfig | own, embed_dim=embed_dim)

    def small_engine(regularizer_config: Any, **parts: dict[str, Any]) -> Any:
        parts = {name: {**part, "params": part["params"] | own} for name, part in parts.items()}
        return engine(regularizer_config=regularizer_config, **parts)

    def small_wan22(**settings: Any) -> Any:
        widths = {"dim": len(tensors["encoder.conv1.weight"]), "dec_dim": len(tensors["decoder.head.0.gamma"])}
        return wan22(**settings | widths)

    with (
        mock.patch.object(comfy.ldm.wan.vae2_2, "WanVAE", small_wan22),
        mock.patch.object(comfy.sd, "AutoencoderKL", small_kl),
        mock.patch.object(comfy.sd, "AutoencodingEngine", small_engine),
    ):
        return comfy.sd.VAE(sd=tensors, dtype=torch.float32)


def _sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What ComfyUI would have detected of a model of the released proportions."""
    kind = config.get("image_model")  # none in UNets
    if kind in ("flux", "flux2", "chroma"):
        norm = "double_blocks.0.img_attn.norm.key_norm."
        head = shapes.get(f"{norm}scale", shapes.get(f"{norm}weight", (0,)))[0]
        axes = [head // 4] * 4 if kind == "flux2" else [head // 8, 7 * head // 16, 7 * head // 16]
        approximator = "distilled_guidance_layer."
        own = (
            {}
            if kind != "chroma"
            else {
                "hidden_dim": shapes[f"{approximator}in_proj.weight"][0],
                "out_dim": shapes[f"{approximator}out_proj.weight"][0],
                "n_layers": _count(shapes, f"{approximator}layers."),
            }
        )
        return {"axes_dim": axes, "num_heads": config["hidden_size"] // head, **own}
    if kind == "lumina2" and "cap_pad_token" in shapes:
        head = shapes["layers.0.attention.q_norm.weight"][0]
        heads = config["dim"] // head
        refiners = {name.split(".")[1] for name in shapes if name.startswith("noise_refiner.")}
        return {
            "n_heads": heads, "n_kv_heads": heads, "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
            "n_refiner_layers": len(refiners),
        }  # fmt: skip
    if kind == "ernie":
        width, head = shapes["x_embedder.proj.weight"][0], shapes["layers.0.self_attention.norm_q.weight"][0]
        return {
            "hidden_size": width, "num_attention_heads": width // head, "num_layers": _count(shapes, "layers."),
            "ffn_hidden_size": shapes["layers.0.mlp.gate_proj.weight"][0],
            "text_in_dim": shapes["text_proj.weight"][1], "rope_axes_dim": (head // 4, 3 * head // 8, 3 * head // 8),
        }  # fmt: skip
    if kind == "ideogram4":
        width, head = shapes["input_proj.weight"][0], shapes["layers.0.attention.norm_q.weight"][0]
        return {
            "num_attention_heads": width // head, "attention_head_dim": head,
            "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
            "adaln_dim": shapes["adaln_proj.weight"][0], "llm_features_dim": shapes["llm_cond_proj.weight"][1],
            "rope_theta": 5000000, "mrope_section": [part * head // 256 for part in (24, 20, 20)], "norm_eps": 1e-5,
        }  # fmt: skip
    if kind == "anima":
        head = shapes["blocks.0.self_attn.q_norm.weight"][0]
        return {
            "num_heads": config["model_channels"] // head,
            "crossattn_emb_channels": shapes["blocks.0.cross_attn.k_proj.weight"][1],
            "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
        }
    if kind == "lumina2":
        head = shapes["layers.0.attention.q_norm.weight"][0]
        keys = (shapes["layers.0.attention.qkv.weight"][0] - config["dim"]) // 2
        return {
            "n_heads": config["dim"] // head, "n_kv_heads": keys // head, "axes_dims": [head // 3] * 3,
            "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
            "n_refiner_layers": len({name.split(".")[1] for name in shapes if name.startswith("noise_refiner.")}),
        }  # fmt: skip
    if kind == "qwen_image":
        head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
        return {
            "attention_head_dim": head,
            "num_attention_heads": shapes["img_in.weight"][0] // head,
            "joint_attention_dim": shapes["txt_norm.weight"][0],
            "axes_dims_rope": (head // 8, 7 * head // 16, 7 * head // 16),
        }
    if kind == "krea2":
        head = shapes["blocks.0.attn.qknorm.qnorm.scale"][0]
        text = "txtfusion.layerwise_blocks.0.attn."
        text_head = shapes[f"{text}qknorm.qnorm.scale"][0]
        return {
            "heads": shapes["blocks.0.attn.wq.weight"][0] // head,
            "kvheads": shapes["blocks.0.attn.wk.weight"][0] // head,
            "txtheads": shapes[f"{text}wq.weight"][0] // text_head,
            "txtkvheads": shapes[f"{text}wk.weight"][0] // text_head,
        }
    return {}


def _adapter(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of Anima's adapter."""
    block = "llm_adapter.blocks.0.cross_attn."
    width, source = shapes[f"{block}k_proj.weight"]
    return {
        "source_dim": source,
        "target_dim": shapes["llm_adapter.embed.weight"][1],
        "model_dim": width,
        "num_layers": _count(shapes, "llm_adapter.blocks."),
        "num_heads": width // shapes[f"{block}q_norm.weight"][0],
    }


def _fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Matrices get the file's shapes, and lists of blocks the file's length."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and name.startswith("txtfusion."):
            kept = {key.removeprefix(f"{name}.").split(".")[0] for key in shapes if key.startswith(f"{name}.")}
            del child[len(kept) :]
    for name, layer in module.named_modules():
        for leaf in ("weight", "bias"):
            size, tensor = shapes.get(f"{name}.{leaf}"), getattr(layer, leaf, None)
            if isinstance(layer, nn.Linear | nn.Embedding) and size is not None and tuple(tensor.shape) != size:
                setattr(layer, leaf, nn.Parameter(tensor.new_empty(size), requires_grad=False))


def _count_modulation(denoiser: Any) -> None:
    """As many rows of modulation as the blocks need."""
    forward, parameters = type(denoiser).forward_orig, denoiser.params
    rows = 3 * parameters.depth_single_blocks + 12 * parameters.depth + 2
    constants = tuple(rows if one == _CHROMA_ROWS else one for one in forward.__code__.co_consts)
    counted = FunctionType(
        forward.__code__.replace(co_consts=constants), forward.__globals__, None, forward.__defaults__
    )
    denoiser.forward_orig = MethodType(counted, denoiser)


def _clip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Settings of a CLIP, which ComfyUI passes on under the name of the encoder."""
    width, inner = shapes[f"{_CLIP}0.mlp.fc2.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": _count(shapes, _CLIP),
    }


def _own_clip(clips: Mapping[int, dict[str, Any]]) -> Callable[..., Any]:
    """A stand-in for ComfyUI's function that gives each CLIP its settings; they are found by its layers."""

    def options_of(sd: Mapping[str, Tensor], tokenizer_data: Any, options: dict[str, Any]) -> Any:
        if (layers := _count(sd, _CLIP)) in clips:
            options = {**options, f"clip_{'g' if layers == 32 else 'l'}_model_config": clips[layers]}
        return tokenizer_data, options

    return options_of


def _t5(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rows, d_model = shapes[f"{_T5}0.layer.0.SelfAttention.q.weight"]
    heads = shapes[f"{_T5}0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "d_model": d_model,
        "d_ff": shapes[f"{_T5}0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": rows // heads,
        "num_heads": heads,
        "num_layers": _count(shapes, _T5),
    }


def _small_vision(tower: Any, shapes: Mapping[str, tuple[int, ...]]) -> Callable[..., nn.Module]:
    """A stand-in for ComfyUI's class of Qwen2.5-VL's vision tower, which makes it in the file's sizes."""
    sizes = _vision(shapes, "visual.", "gate_proj")
    own = {"num_layers": sizes.pop("depth"), **sizes}
    return lambda **options: tower(**{**options, **own})


def _vision(shapes: Mapping[str, tuple[int, ...]], start: str, inner: str) -> dict[str, int]:
    return {
        "hidden_size": shapes[f"{start}patch_embed.proj.weight"][0],
        "intermediate_size": shapes[f"{start}blocks.0.mlp.{inner}.weight"][0],
        "depth": _count(shapes, f"{start}blocks."),
    }


def _by_t5(kinds: Any) -> Callable[..., Any]:
    """A stand-in for ComfyUI's detection of ByT5 and Qwen2.5-VL."""
    return lambda tensors: (
        kinds.BYT5_SMALL_GLYPH if f"{_T5}0.layer.0.SelfAttention.q.weight" in tensors else kinds.QWEN25_7B
    )


def _language_model(shapes: Mapping[str, tuple[int, ...]], head: int) -> dict[str, Any]:
    inner, width = shapes["layers.0.mlp.gate_proj.weight"]
    return {
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, "layers."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head,
    }


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(str(file), framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 - no mapping
