"""Small models of the transformer families in ComfyUI: what its detection and its classes take for granted, set aside.

ComfyUI 0.33 knows these families by released widths, and has some of them written into its classes. `taken_small`
changes these numbers and no computation:

- Sizes of heads are read from the file's norms of queries and keys: the numbers of heads and the axes of the rotary
  embedding of Flux.1, Flux.2, Krea 2 (128 per head there) and Z-Image (recognised by a width of 3840, as Lumina 2 is).
- Stable Diffusion XL is recognised by the width of its first level, of its text and of its other conditions, and by
  the number of transformer layers of each level; any UNet with other conditions than text is taken for it here.
- A matrix has the file's shape where ComfyUI computes another one: the inner widths of MLPs (multiples of 256 in
  Z-Image, of 128 in Krea 2), Z-Image's time embedding. Krea 2 has two text blocks of either kind there, and as many as
  the file has here.
- Text encoders: Qwen3 is known by a width of 2560, Qwen3-VL by its vision tower, which is left out of the files and
  small here. Widths and layers of T5, CLIP-L and Qwen3 come from the file, the sizes of Qwen3's heads too.
- UMT5 is known by 24 layers, and the autoencoder of Wan 2.2 is 160 and 256 wide there.
- The autoencoder of latent diffusion is 128 wide with two residual blocks a level in ComfyUI, and of the file's width
  with one here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["load_autoencoder", "load_encoders", "taken_small"]

_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
_VISION = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "deepstack_visual_indexes": [0]}


@contextlib.contextmanager
def taken_small() -> Iterator[None]:
    """Denoisers of any width are loaded inside. ComfyUI loads a file again to train it, so that belongs inside too."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.supported_models

    detect, load = comfy.model_detection.detect_unet_config, comfy.model_base.BaseModel.load_model_weights
    sdxl, z_image = comfy.supported_models.SDXL, comfy.supported_models.ZImage

    def detected(state_dict: dict[str, Tensor], prefix: str, metadata: Any = None) -> Any:
        config = detect(state_dict, prefix, metadata=metadata)
        if config is None:
            return None
        sizes = {key.removeprefix(prefix): tuple(t.shape) for key, t in state_dict.items() if key.startswith(prefix)}
        config |= _sizes(config, sizes)
        if config.get("num_classes") == "sequential":
            sdxl.unet_config = {name: config.get(name, value) for name, value in sdxl.unet_config.items()}
        if config.get("image_model") == "lumina2":
            z_image.unet_config = {**z_image.unet_config, "dim": config["dim"]}
        return config

    def loaded(self: Any, state_dict: dict[str, Tensor], prefix: str = "", **options: Any) -> Any:
        shapes = {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in state_dict.items()}
        _fit(self.diffusion_model, shapes)
        return load(self, state_dict, prefix, **options)

    with (
        mock.patch.object(comfy.model_detection, "detect_unet_config", detected),
        mock.patch.object(comfy.model_base.BaseModel, "load_model_weights", loaded),
    ):
        yield


def load_encoders(files: Sequence[Path], clip_type: str) -> Any:
    """ComfyUI's CLIP of text encoders of any width, in fp32; `clip_type` as in its loader nodes."""
    import comfy.sd
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.qwen3vl as qwen3vl

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= _shapes(file)
    options: dict[str, Any] = {"dtype": torch.float32}
    head = 0
    start = next((one for one in ("model.language_model.", "model.") if f"{one}norm.weight" in shapes), None)
    with contextlib.ExitStack() as stack:
        if _UMT5 in shapes:
            options["umt5xxl_model_config"] = {**_t5(shapes), "vocab_size": shapes["shared.weight"][0]}
            stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL))
        elif start is None:
            options |= _clip_and_t5(shapes)
        else:
            kind = "qwen3_4b" if start == "model." else "qwen3vl_4b"
            own = {name.removeprefix(start): size for name, size in shapes.items()}
            options[f"{kind}_model_config"] = _qwen3(own)
            head = own["layers.0.self_attn.q_norm.weight"][0]
            for config in (llama.Qwen3_4BConfig, qwen3vl.Qwen3VL_4BConfig):
                stack.enter_context(mock.patch.object(config, "head_dim", head))
            stack.enter_context(mock.patch.dict(qwen3vl.QWEN3VL_VISION, {"qwen3vl_4b": _VISION}))
            found = getattr(comfy.sd.TEModel, kind.upper())
            stack.enter_context(mock.patch.object(comfy.sd, "detect_te_model", lambda _: found))
        clip = comfy.sd.load_clip(
            [str(file) for file in files], clip_type=comfy.sd.CLIPType[clip_type.upper()], model_options=options
        )
    for module in clip.cond_stage_model.modules():  # the class' size is looked up again in the forward pass
        if head and hasattr(getattr(module, "config", None), "head_dim"):
            module.config.head_dim = head
    return clip


def load_autoencoder(file: Path) -> Any:
    """ComfyUI's VAE of an autoencoder of any width, in fp32."""
    import comfy.ldm.wan.vae2_2
    import comfy.sd
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(file))
    first = tensors.get("encoder.conv_in.weight")  # Wan's, whose width ComfyUI reads itself, has another name for it
    own = {} if first is None else {"ch": first.shape[0], "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
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
    if kind in ("flux", "flux2"):
        norm = "double_blocks.0.img_attn.norm.key_norm."
        head = shapes.get(f"{norm}scale", shapes.get(f"{norm}weight", (0,)))[0]
        axes = [head // 4] * 4 if kind == "flux2" else [head // 8, 7 * head // 16, 7 * head // 16]
        return {"axes_dim": axes, "num_heads": config["hidden_size"] // head}
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


def _fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Matrices get the file's shapes, and lists of blocks the file's length."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and name.startswith("txtfusion."):
            kept = {key.removeprefix(f"{name}.").split(".")[0] for key in shapes if key.startswith(f"{name}.")}
            del child[len(kept) :]
    for name, layer in module.named_modules():
        for leaf in ("weight", "bias"):
            size, tensor = shapes.get(f"{name}.{leaf}"), getattr(layer, leaf, None)
            if isinstance(layer, nn.Linear) and size is not None and tuple(tensor.shape) != size:
                setattr(layer, leaf, nn.Parameter(tensor.new_empty(size), requires_grad=False))


def _clip_and_t5(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    clip = "text_model.encoder.layers."
    width, inner = shapes[f"{clip}0.mlp.fc2.weight"]
    return {
        "model_config": {  # of CLIP-L, which ComfyUI then passes on by that name
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": width // 64,
            "num_hidden_layers": _count(shapes, clip),
        },
        "t5xxl_model_config": _t5(shapes),
    }


def _t5(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    t5 = "encoder.block."
    rows, d_model = shapes[f"{t5}0.layer.0.SelfAttention.q.weight"]
    heads = shapes[f"{t5}0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "d_model": d_model,
        "d_ff": shapes[f"{t5}0.layer.1.DenseReluDense.wi_0.weight"][0],
        "d_kv": rows // heads,
        "num_heads": heads,
        "num_layers": _count(shapes, t5),
    }


def _qwen3(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    head = shapes["layers.0.self_attn.q_norm.weight"][0]
    inner, width = shapes["layers.0.mlp.gate_proj.weight"]
    return {
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, "layers."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(str(file), framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 - no mapping
