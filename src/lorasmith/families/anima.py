"""Anima (CircleStone Labs 2026): NVIDIA's Cosmos-Predict2 as a rectified-flow transformer for drawings, with an adapter
that makes its text conditioning.

The adapter, a small transformer, turns the T5 tokens of a prompt into rows of conditioning while it attends to Qwen3's
states of the same prompt, without a template. The transformer attends to all of at least 512 rows, zeros included.
Nothing is fused in the original layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning, check_even, collate
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import QWEN_AUTOENCODER
from lorasmith.families.parts.encoders import parse_weights, t5_tokenizer
from lorasmith.families.parts.language_models import hidden_states, qwen3_paths, t5_tokens
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import EncoderNames, OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_ROWS = 512  # of conditioning, at least
_NO_TOKEN = -1
_END_OF_TEXT = "<|endoftext|>"
_ENCODER_LAYERS = 28  # of Qwen3 0.6B

# Of Cosmos-Predict2's released configurations, those of the one that Anima was trained from.
_FIXED = {"rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
_ADAPTER, _ADAPTER_THERE = "text_conditioner", "llm_adapter"

_ATTENTION = ("transformer_blocks.*.attn[12].to_*",)
_FEED_FORWARD = ("transformer_blocks.*.ff.net.*",)
_IN_ADAPTER = (f"{_ADAPTER}.blocks.*_proj", f"{_ADAPTER}.blocks.*.mlp.*")
_IN_SD_SCRIPTS = (  # all but the adapter's last layer
    *("transformer_blocks.*", f"{_ADAPTER}.blocks.*", "patch_embed.*", "time_embed.*", "norm_out.*", "proj_out"),
)
_TOP = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
_PARTS = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "norm1.linear": "adaln_modulation_self_attn",
    "norm2.linear": "adaln_modulation_cross_attn",
    "norm3.linear": "adaln_modulation_mlp",
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}
_BLOCK_LAYERS = r"((self|cross)_attn_((q|k|v|output)_proj|[qk]_norm)|mlp_layer[12]|adaln_modulation_)"


class Anima(Family):
    """The base model and its previews."""

    name = "anima"
    title = "Anima"
    pipeline = "AnimaModularPipeline"
    network = "lorasmith.families.parts.anima_network.AnimaNetwork"
    denoiser_parts = (_ADAPTER,)
    modelspec_implementation = "https://huggingface.co/circlestone-labs/Anima"
    kohya_name = "anima"
    modelspec_name = "anima"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        unknown_to_comfyui=("*",),
        diffusers_applies={"ai-toolkit": ("*",)},
        diffusers_refuses_others=True,
        sd_scripts_applies=_IN_SD_SCRIPTS,
    )
    # ComfyUI's `supported_models.Anima` and scheduler_config.json.
    own_diffusion = Diffusion("flow", FlowSchedule(shift=3.0))
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, *_FEED_FORWARD)),
        "attention+ff+adapter": Rule((*_ATTENTION, *_FEED_FORWARD, *_IN_ADAPTER), linear_only=True),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    signs = ("llm_adapter.blocks.0.cross_attn.q_proj.weight", "blocks.0.mlp.layer1.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen3",
            "qwen_3_06b_base.safetensors",
            ("text_encoders.qwen3_06b.transformer.",),
            widths=(1024,),
            hub=HubFolder("circlestone-labs/Anima/split_files/text_encoders", 1.19),
        )
    }
    autoencoder = QWEN_AUTOENCODER
    routing = Routing(blocks={"transformer_blocks": {"hidden_states": "bp.", "image_rotary_emb": "p."}})
    clip_types = ("stable_diffusion",)  # ComfyUI's template; it goes by the encoder's width
    own_defaults = Defaults(
        learning_rate=1e-4,  # sd-scripts' example
        # As OneTrainer and sd-scripts, which leave the adapter out: it is less stable, and wants lower rates.
        guidance=4.0,  # AnimaModularPipeline's and ComfyUI's template
        timestep_distribution="logit_normal",  # OneTrainer's preset, and sd-scripts' `sigmoid`
    )
    unused_tensors = ("pos_embedder.*", "accum_*", "*_extra_state")  # of Cosmos' training
    releases = (
        Release(
            name="anima",
            title="Anima",
            about="Anime and illustrations, in little memory.",
            file="anima-base-v1.0.safetensors",
            hub=HubFolder("circlestone-labs/Anima/split_files/diffusion_models", 4.18),
            licence="CircleStone Labs Non-Commercial License",
            card="circlestone-labs/Anima",
        ),
    )
    released = {"num_attention_heads": 16, **_FIXED}
    lora_signatures = (
        Signature(title, r"(^|_)(llm_adapter|text_conditioner)_(blocks_\d|embed|out_proj|norm)"),
        Signature(title, DENOISER_START + r"blocks_\d+_" + _BLOCK_LAYERS, order=4),
        Signature(title, DENOISER_START + r"transformer_blocks_\d+_norm[123]_linear_[12]", order=4),
        Signature(title, DENOISER_START + r"transformer_blocks_\d+_attn2_to_[kv]", 1024, order=4),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, patch = shapes["x_embedder.proj.1.weight"]
        channels = patch // 4 - 1  # the last one is the mask of padding
        if channels != self.autoencoder.channels:
            raise ModelError(
                f"this {self.title} variant takes {channels} input channels, but only text-to-image models with "
                f"{self.autoencoder.channels} are supported"
            )
        head = shapes["blocks.0.self_attn.q_norm.weight"][0]
        return {
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // 4,
            "num_attention_heads": width // head,
            "attention_head_dim": head,
            "num_layers": block_count(shapes, "blocks."),
            "mlp_ratio": shapes["blocks.0.mlp.layer1.weight"][0] / width,
            "text_embed_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
            "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
            _ADAPTER: _adapter_config(shapes),
            **_FIXED,
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        kind, _, rest = path.partition(".")
        if kind == _ADAPTER:
            return OriginalName(f"{_ADAPTER_THERE}.{rest}")
        index, _, part = rest.partition(".")
        modulation, _, number = part.rpartition("_")  # norm1.linear_2
        attention, _, layer = part.partition(".")
        if modulation in _PARTS:
            inside = f"{_PARTS[modulation]}.{number}"
        else:
            inside = _PARTS[part] if part in _PARTS else f"{_PARTS[attention]}.{_PARTS[layer]}"
        return OriginalName(f"blocks.{index}.{inside}")

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        """sd-scripts trains the encoder too."""
        encoder: Any = text_encoders.get("text_encoder")
        layers = range(_ENCODER_LAYERS) if encoder is None else encoder.layers
        return {
            "text_encoder": EncoderNames(
                qwen3_paths(len(layers)), kohya=("lora_te_",), comfyui=("qwen3_06b",), comfyui_stem="model."
            )
        }

    def encoder_width(self, denoiser: nn.Module, component: str) -> int | None:
        adapter: Any = denoiser.text_conditioner
        return int(adapter.config.source_dim)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text, follows_diffusers = texts["text_encoder"], encoding.follows_diffusers
        stretches = [stretch for stretch, _ in parse_weights(text)]
        ids = [token for stretch in stretches for token in tokenizer(stretch, add_special_tokens=False).input_ids]
        ids = ids[:_ROWS] if follows_diffusers else ids
        if ids or not follows_diffusers:  # an empty prompt is one token in ComfyUI, a state of zeros in diffusers
            context = hidden_states(encoder, ids or [tokenizer.convert_tokens_to_ids(_END_OF_TEXT)], [-1]).flatten(2)
        else:
            config: Any = encoder.config
            context = torch.zeros(1, 1, config.hidden_size, device=device_of(encoder))
        tokens = t5_tokens(text, t5_tokenizer(), **encoding.tokens_of("t5xxl", 1, _ROWS))
        numbers, weights = zip(*tokens, strict=True)
        return Conditioning(
            {
                "context": context,
                "t5xxl_ids": torch.tensor([numbers], device=context.device),
                "t5xxl_weights": torch.tensor([weights], device=context.device),
            },
            text,
        )

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        """Filled-up T5 tokens are −1 there, and any filling makes a mask."""
        counts = [
            conditioning.tensors["t5xxl_ids"].shape[1]
            for conditioning in conditionings
            if "t5xxl_ids" in conditioning.tensors
        ]
        if len(set(counts)) > 1 and len(counts) == len(conditionings):
            conditionings = [_filled(conditioning, max(counts)) for conditioning in conditionings]
        return collate(conditionings, repeatable=False)

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        return {"context": (1, _ROWS, denoiser.config.text_embed_dim)}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        tensors = conditioning.tensors
        prediction: Tensor = denoiser(
            latents,
            time.to(latents.dtype),
            tensors["context"],
            ids=tensors.get("t5xxl_ids"),
            weights=tensors.get("t5xxl_weights"),
            mask=conditioning.mask,
        )
        return prediction


def _filled(conditioning: Conditioning, tokens: int) -> Conditioning:
    """The conditioning with a number of T5 tokens, and with a mask."""
    tensors = dict(conditioning.tensors)
    missing = tokens - tensors["t5xxl_ids"].shape[1]
    tensors["t5xxl_ids"] = F.pad(tensors["t5xxl_ids"], (0, missing), value=_NO_TOKEN)
    if "t5xxl_weights" in tensors:
        tensors["t5xxl_weights"] = F.pad(tensors["t5xxl_weights"], (0, missing))
    mask = conditioning.mask
    if mask is None:
        mask = torch.ones_like(tensors["context"][..., 0], dtype=torch.bool)
    return replace(conditioning, tensors=tensors, mask=mask)


def _adapter_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration of the adapter's class for original-layout shapes."""
    block = f"{_ADAPTER_THERE}.blocks.0."
    vocabulary, target = shapes[f"{_ADAPTER_THERE}.embed.weight"]
    width, source = shapes[f"{block}cross_attn.k_proj.weight"]
    return {
        "source_dim": source,
        "target_dim": target,
        "model_dim": width,
        "num_layers": block_count(shapes, f"{_ADAPTER_THERE}.blocks."),
        "num_attention_heads": width // shapes[f"{block}cross_attn.q_norm.weight"][0],
        "mlp_ratio": shapes[f"{block}mlp.0.weight"][0] / width,
        "target_vocab_size": vocabulary,
        "use_self_attention": f"{block}self_attn.q_proj.weight" in shapes,
        "use_layer_norm": f"{block}norm_mlp.bias" in shapes,
    }


register(Anima())
