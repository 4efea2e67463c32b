"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): rectified-flow transformers with three encoders.

Text is the hidden states of CLIP-L and OpenCLIP bigG side by side, filled with zeros to the width of T5's, which
follow. Their pooled vectors, the first unprojected, are a condition beside time. Any of the encoders may be missing:
zeros take its place. The original layout fuses query, key and value, and exchanges halves of the last modulations.

Stable Diffusion 3 medium has no norms of queries and keys, which 3.5 has. Blocks of 3.5 medium have a second attention,
of the picture to itself; large has 38 blocks. Their latents have the form of Flux.1's, but other constants.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.placement import device_of
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning, check_even
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.parts.clip import CLIP_L_SLOT, CONTEXT_LENGTH, encode_prompts, released_paths, trained_paths
from lorasmith.families.parts.language_models import RELEASED_PATHS, T5XXL_SLOT, encode_t5
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import EncoderNames, OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_HEAD_WIDTH = 64
_CHANNELS = 16
_CLIPS = {"text_encoder": 768, "text_encoder_2": 1280}  # width of states and of the pooled vector
_T5, _T5_WIDTH = "text_encoder_3", 4096
_T5_TOKENS = {"comfyui": 77, "diffusers": 256}  # at least; diffusers cuts longer prompts

_ATTENTION = (
    *("transformer_blocks.*.attn.to_*", "transformer_blocks.*.attn.add_*_proj"),
    "transformer_blocks.*.attn2.to_*",
)
_MLP = ("transformer_blocks.*.ff.net.*", "transformer_blocks.*.ff_context.net.*")
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_PARTS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# Position of each split module among the thirds of the fused tensor.
_FUSED = {
    **{f"attn.to_{part}": ("x_block.attn.qkv", third) for third, part in enumerate("qkv")},
    **{f"attn.add_{part}_proj": ("context_block.attn.qkv", third) for third, part in enumerate("qkv")},
    **{f"attn2.to_{part}": ("x_block.attn2.qkv", third) for third, part in enumerate("qkv")},
}


class StableDiffusion3(Family):
    """Stable Diffusion 3.5 medium and large, and 3 medium."""

    name = "sd3"
    title = "Stable Diffusion 3.5"
    pipeline = "StableDiffusion3Pipeline"
    network = "lorasmith.families.parts.masked_transformers.MaskedSD3Transformer"
    modelspec_implementation = "https://github.com/Stability-AI/sd3.5"
    kohya_name = "sd3"
    modelspec_name = "stable-diffusion-3-5"
    portable = "diffusers"
    limits = ProgramLimits(diffusers_applies={})
    # ComfyUI's and scheduler_config.json's shift.
    own_diffusion = Diffusion("flow", FlowSchedule(shift=3.0, time_scale=1000.0))
    a1111_version = "SD3"
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, *_MLP)),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    signs = ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight")
    text_encoders = {
        "text_encoder": CLIP_L_SLOT,
        "text_encoder_2": EncoderSlot(
            "clip_g",
            "clip_g.safetensors",
            ("text_encoders.clip_g.transformer.",),
            hub=HubFolder("Comfy-Org/stable-diffusion-3.5-fp8/text_encoders", 1.39),
        ),
        _T5: T5XXL_SLOT,
    }
    needs_each_encoder = False
    clip_types = ("sd3",)
    routing = Routing(blocks={"transformer_blocks": {"hidden_states": "bp.", "joint_attention_kwargs": "b..t"}})
    own_defaults = Defaults(
        targets="attention+ff",  # sd-scripts' layers but the modulation
        guidance=4.0,  # ComfyUI's template
        timestep_distribution="logit_normal",  # the paper's, diffusers' script's and OneTrainer's preset
    )
    distilled = {"turbo": 4}  # steps of ComfyUI's templates
    autoencoder = AutoencoderSlot(
        "kl",
        channels=_CHANNELS,
        usual_file="sd3_vae.safetensors",
        settings={"scaling_factor": 1.5305, "shift_factor": 0.0609},
    )
    releases = (
        Release(
            name="sd3.5-medium",
            title="Stable Diffusion 3.5 medium",
            about="Many styles and sizes of pictures, in little memory.",
            file="sd3.5_medium.safetensors",
            hub=HubFolder("stabilityai/stable-diffusion-3.5-medium", 5.11),
            licence="Stability AI Community License",
            card="stabilityai/stable-diffusion-3.5-medium",
            is_gated=True,
            holds=("vae",),
            config={
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 24 * _HEAD_WIDTH,
                "pos_embed_max_size": 384,
            },
        ),
    )
    # The blocks of large and the second attentions of medium, so that names of either are known.
    released = {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 38 * _HEAD_WIDTH,
        "pos_embed_max_size": 192,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
    lora_signatures = (
        Signature(title, r"(^|_)joint_blocks_\d"),
        Signature(title, r"(^|_)transformer_blocks_\d+_(ff_context|attn_add_q_proj)", order=4),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        if channels != _CHANNELS:
            raise ModelError(
                f"this Stable Diffusion 3 variant takes {channels} input channels, "
                f"but only text-to-image models with {_CHANNELS} are supported"
            )
        blocks, norm = block_count(shapes, "joint_blocks."), "joint_blocks.0.x_block.attn.ln_q.weight"
        head = shapes[norm][0] if norm in shapes else _HEAD_WIDTH
        caption_width, text_width = shapes["context_embedder.weight"]
        return {
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
            "num_layers": blocks,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": text_width,
            "caption_projection_dim": caption_width,
            "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
            "dual_attention_layers": tuple(
                block for block in range(blocks) if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in shapes
            ),
            "qk_norm": "rms_norm" if norm in shapes else None,
        }

    def table(self, denoiser: Any) -> Mapping[str, OriginalName]:
        # With a buffer, which files hold.
        return {**super().table(denoiser), "pos_embed": OriginalName("", parameters={"pos_embed": "pos_embed"})}

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path], swap_halves=path == "norm_out.linear")
        _, index, rest = path.split(".", 2)
        block = f"joint_blocks.{index}"
        if rest in _FUSED:
            name, third = _FUSED[rest]
            width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
            return OriginalName(f"{block}.{name}", rows=(third * width, (third + 1) * width))
        swaps = rest == "norm1_context.linear" and int(index) == denoiser.config.num_layers - 1
        return OriginalName(f"{block}.{_PARTS[rest]}", swap_halves=swaps)

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        return {
            "text_encoder": EncoderNames(
                released_paths(layers=12), kohya=("lora_te1_",), comfyui=("clip_l",), drops_text_model=True
            ),
            "text_encoder_2": EncoderNames(
                released_paths(layers=32, is_projected=True), kohya=("lora_te2_",), comfyui=("clip_g",)
            ),
            _T5: EncoderNames(RELEASED_PATHS, kohya=("lora_te3_",), comfyui=("t5xxl",)),
        }

    def encoder_width(self, denoiser: Any, component: str) -> int | None:
        return int(denoiser.config.joint_attention_dim) if component == _T5 else None

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        self.check_encoders(encoders)
        clip, pooled = _clip_states(encoders, texts, encoding)
        t5 = _t5_states(encoders, texts[_T5], encoding)
        width = _T5_WIDTH if t5 is None else t5.shape[-1]
        parts = [F.pad(clip, (0, width - clip.shape[-1])) if clip is not None else None, t5]
        there = [part for part in parts if part is not None] or [pooled.new_zeros(1, CONTEXT_LENGTH, width)]
        return Conditioning({"context": torch.cat(there, dim=1), "pooled": pooled}, texts["text_encoder"])

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        return {name: trained_paths(encoder) for name, encoder in text_encoders.items() if name != _T5}

    def encode_again(
        self,
        conditioning: Conditioning,
        encoders: TextEncoders,
        texts: Mapping[str, str],
        encoding: Encoding,
        components: Collection[str],
    ) -> Conditioning:
        if _T5 not in encoders.modules or _T5 in components:
            return super().encode_again(conditioning, encoders, texts, encoding, components)
        clip, pooled = _clip_states(encoders, texts, encoding)
        context = conditioning.tensors["context"]
        if clip is not None:  # T5's states are behind it
            clip = F.pad(clip, (0, context.shape[-1] - clip.shape[-1])).to(context.dtype)
            context = torch.cat((clip, context[:, clip.shape[1] :]), dim=1)
        return replace(conditioning, tensors={**conditioning.tensors, "context": context, "pooled": pooled})

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = CONTEXT_LENGTH + _T5_TOKENS["comfyui"]
        return {
            "context": (1, tokens, denoiser.config.joint_attention_dim),
            "pooled": (1, denoiser.config.pooled_projection_dim),
        }

    def predict(self, denoiser: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        height, width = latents.shape[-2:]
        if max(height, width) > (largest := denoiser.config.pos_embed_max_size * denoiser.config.patch_size):
            raise DataError(
                f"this model has positions for pictures of up to {8 * largest} pixels a side, got {8 * height}×"
                f"{8 * width}; choose a smaller size"
            )
        arguments = None
        if (mask := conditioning.mask) is not None:  # tokens of the picture come first
            picture = mask.new_ones(len(mask), height * width // denoiser.config.patch_size**2)
            arguments = {"attention_mask": torch.cat((picture, mask), dim=1)[:, None, None]}
        prediction: Tensor = denoiser(
            hidden_states=latents,
            encoder_hidden_states=conditioning.tensors["context"],
            pooled_projections=conditioning.tensors["pooled"],
            timestep=time,
            joint_attention_kwargs=arguments,
            return_dict=False,
        )[0]
        return prediction


def _clip_states(encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> tuple[Tensor | None, Tensor]:
    """Contexts of the CLIPs side by side, None without any, and their pooled vectors."""
    there = [component for component in _CLIPS if component in encoders.modules]
    device = device_of(next(iter(encoders.modules.values())))
    if not there or not (encoding.encodes_empty or any(texts[component] for component in _CLIPS)):
        return None, torch.zeros(1, sum(_CLIPS.values()), device=device)
    contexts, pooled = encode_prompts(
        [(texts[file], encoders.tokenizers[file], encoders.modules[file]) for file in there],
        # The last layer is never used, so one skip is already done.
        skip_layers=max(1, encoding.skip_layers),
    )
    found = dict(zip(there, zip(contexts, pooled, strict=True), strict=True))
    for component in _CLIPS.keys() - found.keys():
        found[component] = (
            contexts[0].new_zeros(1, contexts[0].shape[1], _CLIPS[component]),
            pooled[0].new_zeros(1, _CLIPS[component]),
        )
    context = torch.cat([found[component][0] for component in _CLIPS], dim=-1)
    if encoding.follows_diffusers:
        context = context[:, :CONTEXT_LENGTH]
    return context, torch.cat([found[component][1] for component in _CLIPS], dim=-1)


def _t5_states(encoders: TextEncoders, text: str, encoding: Encoding) -> Tensor | None:
    """States of T5; None without it, where diffusers has zeros."""
    tokens = _T5_TOKENS[encoding.lengths]
    if _T5 not in encoders.modules:
        device = device_of(next(iter(encoders.modules.values())))
        return torch.zeros(1, tokens, _T5_WIDTH, device=device) if encoding.follows_diffusers else None
    tokenizer, encoder = encoders.tokenizers[_T5], encoders.modules[_T5]
    if not (text or encoding.encodes_empty):
        return encode_t5("", tokenizer, encoder)  # without any padding
    return encode_t5(text, tokenizer, encoder, **encoding.tokens_of("t5xxl", tokens, tokens))


register(StableDiffusion3(), "stable-diffusion-3", "sd3.5")
