"""Lumina 2 (Qin et al. 2025, arXiv:2503.21758): a rectified-flow transformer with the states of Gemma 2 as text.

Text and picture run through a refiner each, then together. Its time is 1 at the picture, and its prediction points from
noise to picture; both are turned round here. A prompt begins with an instruction and ` <Prompt Start> `, which a user
types, or ComfyUI's node CLIPTextEncodeLumina2. The original layout fuses query, key and value, of which keys and values
have a third of the heads. The autoencoder is that of Flux.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning, check_even
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import FLUX_AUTOENCODER
from lorasmith.families.parts.encoders import parse_weights, weighted_states
from lorasmith.families.parts.language_models import attention_capped, hidden_states
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_WIDTH = 2304
_LAYER = -2  # of the encoder's states
_CAP = 50.0  # of the encoder's attention, in diffusers
_DIFFUSERS_TOKENS = 256

_BLOCKS = ("layers.", "noise_refiner.", "context_refiner.")
_ATTENTION = ("layers.*.attn.to_*",)
_TOP = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.0": "cap_embedder.0",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_PARTS = {
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1": "attention_norm1",  # of blocks without modulation
    "norm1.norm": "attention_norm1",
    "norm1.linear": "adaLN_modulation.1",
    "norm2": "attention_norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}


class Lumina2(Family):
    """Lumina-Image 2.0 and its fine-tunes, such as NetaYume."""

    name = "lumina2"
    title = "Lumina 2"
    pipeline = "Lumina2Pipeline"
    network = "lorasmith.families.parts.masked_transformers.HostMaskedLumina2"
    diffusers_start = "time_caption_embed."
    text_width = "cap_feat_dim"
    modelspec_implementation = "https://github.com/Alpha-VLLM/Lumina-Image-2.0"
    kohya_name = "lumina2"
    modelspec_name = "lumina-2"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        unknown_to_comfyui=("*",),
        diffusers_applies={"ai-toolkit": tuple(f"{blocks}*" for blocks in _BLOCKS)},
        diffusers_refuses_others=True,
        diffusers_refuses_unknown=True,
        diffusers_whole_blocks=_BLOCKS,
    )
    # ComfyUI's and scheduler_config.json's shift.
    own_diffusion = Diffusion("flow", FlowSchedule(shift=6.0))
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "layers.*.feed_forward.*")),
        "transformer": Rule(("layers.*",), linear_only=True),
    }
    signs = (
        *("noise_refiner.0.attention.k_norm.weight", "layers.0.adaLN_modulation.1.weight"),
        "cap_embedder.1.weight",
    )
    text_encoders = {
        "text_encoder": EncoderSlot(
            "gemma2",
            "gemma_2_2b_fp16.safetensors",
            ("text_encoders.gemma2_2b.transformer.",),
            hub=HubFolder("Comfy-Org/Lumina_Image_2.0_Repackaged/split_files/text_encoders", 5.23),
        )
    }
    clip_types = ("lumina2",)
    own_defaults = Defaults(
        # Whole blocks, with modulation, as sd-scripts trains them; diffusers reads no others by ComfyUI's names.
        targets="transformer",
        guidance=4.0,  # ComfyUI's template
        timestep_distribution="uniform",  # diffusers' script and sd-scripts, which shift by 6
    )
    autoencoder = replace(FLUX_AUTOENCODER, prefixes=("vae.",))
    routing = Routing(
        blocks={"layers": {"hidden_states": "bt.", "attention_mask": "bt", "image_rotary_emb": "bt."}}, text="packed"
    )
    unused_tensors = ("norm_final.weight",)
    released = {"cap_feat_dim": _WIDTH, "scaling_factor": 1.0}
    lora_signatures = (
        Signature(title, DENOISER_START + r"layers_\d+_(attention|attn|feed_forward)_", _WIDTH, order=5),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, text_width = shapes["cap_embedder.1.weight"]
        head = shapes["layers.0.attention.q_norm.weight"][0]
        return {
            "in_channels": shapes["x_embedder.weight"][1] // 4,
            "hidden_size": width,
            "num_layers": block_count(shapes, "layers."),
            "num_refiner_layers": block_count(shapes, "noise_refiner."),
            "num_attention_heads": width // head,
            "num_kv_heads": (shapes["layers.0.attention.qkv.weight"][0] - width) // 2 // head,
            "multiple_of": math.gcd(shapes["layers.0.feed_forward.w1.weight"][0], 256),
            "axes_dim_rope": (head // 3,) * 3,
            # Longer prompts than diffusers' own limit of 300 tokens, as in ComfyUI.
            "axes_lens": (1536, 512, 512),
            "cap_feat_dim": text_width,
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        kind, index, rest = path.split(".", 2)
        block = f"{kind}.{index}"
        if rest in ("attn.to_q", "attn.to_k", "attn.to_v"):
            queries, keys = (denoiser.get_submodule(f"{block}.attn.to_{part}").weight.shape[0] for part in "qk")
            start, rows = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}[rest[-1]]
            return OriginalName(f"{block}.attention.qkv", rows=(start, start + rows))
        return OriginalName(f"{block}.{_PARTS[rest]}")

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, text = self.text_encoder(encoders, "text_encoder"), texts["text_encoder"]
        tokenizer = encoders.tokenizers["text_encoder"]
        tokens = [(tokenizer.bos_token_id, 1.0)]
        for stretch, weight in parse_weights(text):
            tokens += [(token, weight) for token in tokenizer(stretch, add_special_tokens=False).input_ids]
        if encoding.follows_diffusers:
            tokens = tokens[:_DIFFUSERS_TOKENS]
        with attention_capped(encoder, _CAP if encoding.follows_diffusers else None):
            states = hidden_states(encoder, [token for token, _ in tokens], [_LAYER]).flatten(2)
            if any(weight != 1.0 for _, weight in tokens):
                missing = len(tokens) - 1
                row = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * missing]
                mask = [True, *[False] * missing]
                empty = hidden_states(encoder, row, [_LAYER], mask=mask).flatten(2)
                states = weighted_states(states, empty, [[weight for _, weight in tokens]])
        return Conditioning({"context": states}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        context, mask, on_cpu = conditioning.tensors["context"], conditioning.mask, conditioning.mask_on_cpu
        whole = context.shape[:2]
        towards_picture: Tensor = denoiser(
            hidden_states=latents.contiguous(),
            timestep=1 - time.to(latents.device),
            encoder_hidden_states=context,
            encoder_attention_mask=context.new_ones(whole, dtype=torch.bool) if mask is None else mask,
            mask_on_cpu=torch.ones(whole, dtype=torch.bool) if on_cpu is None else on_cpu,
            return_dict=False,
        )[0]
        return -towards_picture


register(Lumina2(), "lumina-2")
