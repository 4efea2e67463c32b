"""Tiny random models of the transformer families: as files under their usual names, and as diffusers' own parts.

Parts are made with diffusers' and transformers' classes, and written as ComfyUI users have them: the denoiser and the
autoencoder in the original layout, encoders in transformers' names under the prefix of released files. So what is
loaded can be held against the parts themselves, and against diffusers' pipeline of them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn

from lorasmith.families.base import FAMILIES
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.clip_text import clip_tokenizer
from lorasmith.families.parts.tokenizers import TokenizerSource, qwen_tokenizer, t5_tokenizer, tekken_tokenizer
from tests.families.original_models import clip_l_shapes, save

__all__ = ["TINY", "Case", "TinyFamily", "original_tensors", "randomized"]

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""What the chat templates of Qwen3 write for a prompt."""

VOCABULARY = 49408


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module whose every tensor is a function of its name, without gradients."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.copy_(models.weight(name, tuple(tensor.shape), seed=seed))
    return module.eval().requires_grad_(False)


def original_tensors(family: str, denoiser: nn.Module) -> dict[str, Tensor]:
    """A denoiser's tensors in the original layout, by the family's table read backwards."""
    table = FAMILIES[family].table(denoiser)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in denoiser.state_dict().items():
        path, _, leaf = name.rpartition(".")
        place = table[path]
        if place.swap_halves:
            tensor = torch.cat(tuple(reversed(tensor.chunk(2))))
        key = place.tensor(leaf)
        parts.setdefault(key, []).append((place.rows[0] if place.rows else 0, tensor))
    return {
        key: torch.cat([tensor for _, tensor in sorted(rows, key=lambda row: row[0])]) for key, rows in parts.items()
    }


@dataclass(frozen=True)
class TinyFamily:
    """A family, small.

    Attributes:
        parts: makes diffusers' parts by their names in its pipeline (`transformer`, `vae`, `text_encoder`, ...).
        pipeline: name of diffusers' pipeline.
        files: name of the file of each part, and how its tensors are named there.
    """

    parts: Callable[[], dict[str, Any]]
    pipeline: str
    files: Mapping[str, tuple[str, Callable[[nn.Module], dict[str, Tensor]]]]

    def saved(self, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Path]:
        """Each part in a file of its usual name, in ComfyUI's folders."""
        parts, written = self.parts(), {}
        for part, (name, named) in self.files.items():
            tensors = named(parts[part])
            if dtype is not None:
                tensors = {key: one.to(dtype) if one.is_floating_point() else one for key, one in tensors.items()}
            path = folder / "models" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written[part] = save(path, {key: one.contiguous() for key, one in tensors.items()})
        return written

    def denoiser_tensors(self) -> dict[str, Tensor]:
        """The denoiser's tensors as in its file."""
        return self.files["transformer"][1](self.parts()["transformer"])

    def loaded(self, files: Mapping[str, Path]) -> Model:
        """The model in those files."""
        encoders = [path for part, path in files.items() if part.startswith("text_encoder")]
        return load_model(files["transformer"], text_encoders=encoders, vae=files["vae"])

    def made(self) -> Any:
        """diffusers' pipeline of the parts."""
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
        pipeline = getattr(diffusers, self.pipeline)(scheduler=scheduler, **self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@dataclass(frozen=True)
class Case:
    """A family: its small model, the files of it, and what we load from them."""

    name: str
    tiny: TinyFamily
    files: Mapping[str, Path]
    ours: Model

    @classmethod
    def of(cls, name: str, folder: Path) -> Case:
        files = TINY[name].saved(folder)
        return cls(name, TINY[name], files, TINY[name].loaded(files))


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Black Forest Labs' name of the weights of norms of queries and keys."""
    return {re.sub(r"(query_norm|key_norm)\.weight$", r"\1.scale", name): one for name, one in tensors.items()}


def _krea_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norm = re.compile(r"(qnorm|knorm|prenorm|postnorm|txtmlp\.0|last\.norm)\.weight$")
    flat = {name: one.flatten() if name.endswith(".mod.lin") else one for name, one in tensors.items()}
    return {norm.sub(r"\1.scale", name): one for name, one in flat.items()}


def _kl_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors by their original names."""
    levels = len(vae.config.block_out_channels)  # type: ignore[arg-type, union-attr]
    renames: tuple[tuple[str, Any], ...] = (
        (r"conv_norm_out", "norm_out"),
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample"),
    )
    named = {}
    for name, tensor in vae.state_dict().items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return named


def _clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": one for name, one in encoder.state_dict().items()}


def _t5_names(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}


def _under(prefix: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda encoder: {f"{prefix}{name}": one for name, one in encoder.state_dict().items()}


def _kl(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _qwen(layers: int, **settings: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-6,
            **settings,
        )
    )


def _chatting() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "right"
    return tokenizer


@cache
def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    denoiser = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    clip = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=1,
        num_hidden_layers=12,
        hidden_act="quick_gelu",
        projection_dim=64,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    t5 = T5Config(
        vocab_size=32128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    assert {name.removeprefix("text_model.") for name in CLIPTextModel(clip).state_dict()} == set(
        clip_l_shapes(12, VOCABULARY, 64)
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(_kl(16)),
        "text_encoder": randomized(CLIPTextModel(clip)),
        "text_encoder_2": randomized(T5EncoderModel(t5)),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }


@cache
def _z_image() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    denoiser = ZImageTransformer2DModel(
        dim=64,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        n_refiner_layers=1,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(_kl(16)),
        "text_encoder": randomized(_qwen(3, rope_theta=1e6)),
        "tokenizer": _chatting(),
    }


def _flux2_denoiser(*, has_guidance: bool) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    denoiser = Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        guidance_embeds=has_guidance,
        axes_dims_rope=(8, 8, 8, 8),
    )
    return randomized(denoiser)


@cache
def _klein() -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    return {
        "transformer": _flux2_denoiser(has_guidance=False),
        "vae": randomized(vae),
        "text_encoder": randomized(_qwen(28, rope_theta=1e6)),
        "tokenizer": _chatting(),
    }


def tekken_file() -> bytes:
    """A small vocabulary of Mistral's kind: all bytes, and two longer tokens."""
    words = [*(bytes([byte]) for byte in range(256)), b"in", b"ing"]
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]",
            "default_vocab_size": 1000 + len(words),
            "default_num_special_tokens": 1000,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
    }
    return json.dumps(content).encode()


class _MistralProcessor:
    """The processor of Flux.2's pipeline as far as it uses it: chats to ids, filled with padding on the left."""

    def __init__(self) -> None:
        embedded = torch.frombuffer(bytearray(tekken_file()), dtype=torch.uint8)
        self.tokenizer = tekken_tokenizer(TokenizerSource(embedded={"tekken_model": embedded}))

    def apply_chat_template(self, chats: Any, *, max_length: int, **_: Any) -> dict[str, Tensor]:
        rows, masks = [], []
        for chat in chats:
            said = {message["role"]: message["content"][0]["text"] for message in chat}
            text = f"[SYSTEM_PROMPT]{said['system']}[/SYSTEM_PROMPT][INST]{said['user']}[/INST]"
            ids = [1, *self.tokenizer(text).input_ids][:max_length]
            missing = max_length - len(ids)
            rows.append([*[11] * missing, *ids])
            masks.append([*[0] * missing, *[1] * len(ids)])
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


@cache
def _dev() -> dict[str, Any]:
    from transformers import MistralConfig, MistralModel

    mistral = MistralConfig(
        vocab_size=1258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=31,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        rope_theta=1e9,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    return {
        "transformer": _flux2_denoiser(has_guidance=True),
        "vae": _klein()["vae"],
        "text_encoder": randomized(MistralModel(mistral)),
        "tokenizer": _MistralProcessor(),
    }


def _mistral_names(encoder: nn.Module) -> dict[str, Tensor]:
    vocabulary = torch.frombuffer(bytearray(tekken_file()), dtype=torch.uint8)
    return {**_under("model.")(encoder), "tekken_model": vocabulary}


@cache
def _krea() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel

    denoiser = Krea2Transformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        text_hidden_dim=32,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )
    return {
        "transformer": randomized(denoiser),
        "vae": randomized(AutoencoderKLQwenImage(base_dim=16)),
        "text_encoder": randomized(_qwen(36, rope_theta=5e6)),
        "tokenizer": _chatting(),
    }


def _wan_names(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKLQwenImage's tensors by their original names."""
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    renames: tuple[tuple[str, Any], ...] = (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\.(norm1|conv1|norm2|conv2)\.", lambda match: f".{layers[match[1]]}."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"conv_shortcut", "shortcut"),
        (r"down_blocks\.(\d+)", r"downsamples.\1"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda match: f"upsamples.{4 * int(match[1]) + int(match[2])}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"upsamples.{4 * int(match[1]) + 3}"),
    )
    named = {}
    for name, tensor in vae.state_dict().items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


TINY: dict[str, TinyFamily] = {
    "flux1": TinyFamily(
        _flux,
        "FluxPipeline",
        {
            "transformer": (
                "diffusion_models/flux1-dev.safetensors",
                lambda one: _scaled(original_tensors("flux1", one)),
            ),
            "vae": ("vae/ae.safetensors", _kl_names),
            "text_encoder": ("text_encoders/clip_l.safetensors", _clip_names),
            "text_encoder_2": ("text_encoders/t5xxl_fp16.safetensors", _t5_names),
        },
    ),
    "z-image": TinyFamily(
        _z_image,
        "ZImagePipeline",
        {
            "transformer": (
                "diffusion_models/z_image_bf16.safetensors",
                lambda one: original_tensors("z-image", one) | {"norm_final.weight": torch.ones(64)},
            ),
            "vae": ("vae/ae.safetensors", _kl_names),
            "text_encoder": ("text_encoders/qwen_3_4b.safetensors", _under("model.")),
        },
    ),
    "flux2-klein": TinyFamily(
        _klein,
        "Flux2KleinPipeline",
        {
            "transformer": (
                "diffusion_models/flux-2-klein-base-4b.safetensors",
                lambda one: _scaled(original_tensors("flux2-klein", one)),
            ),
            "vae": ("vae/flux2-vae.safetensors", _kl_names),
            "text_encoder": ("text_encoders/qwen_3_4b.safetensors", _under("model.")),
        },
    ),
    "flux2": TinyFamily(
        _dev,
        "Flux2Pipeline",
        {
            "transformer": (
                "diffusion_models/flux2_dev_fp8mixed.safetensors",
                lambda one: _scaled(original_tensors("flux2", one)),
            ),
            "vae": ("vae/flux2-vae.safetensors", _kl_names),
            "text_encoder": ("text_encoders/mistral_3_small_flux2_bf16.safetensors", _mistral_names),
        },
    ),
    "krea2": TinyFamily(
        _krea,
        "Krea2Pipeline",
        {
            "transformer": (
                "diffusion_models/krea2_raw.safetensors",
                lambda one: _krea_names(original_tensors("krea2", one)),
            ),
            "vae": ("vae/qwen_image_vae.safetensors", _wan_names),
            "text_encoder": ("text_encoders/qwen3vl_4b_bf16.safetensors", _under("model.language_model.")),
        },
    ),
}
"""Small models by the name of their family."""
