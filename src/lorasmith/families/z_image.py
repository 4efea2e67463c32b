"""Z-Image (Tongyi-MAI 2025): a rectified-flow transformer in one stream, with a language model for text.

Text and picture run through refiner blocks of their own, then together through the layers, each filled with learnt
tokens to a multiple of 32. The network counts time from noise to picture and gives the negative of the velocity. The
original layout fuses query, key and value; diffusers splits them. Turbo, which is distilled to eight steps, has the
same tensors as the base model: only names tell them apart.
"""

from __future__ import annotations

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
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.language_models import hidden_states
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_HEAD_WIDTH = 128
_LUMINA_MODULATION = "layers.0.adaLN_modulation.1.weight"  # Lumina 2 is built alike, with an activation before it
_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_LAYER = -2  # of the encoder's states

_ATTENTION = ("layers.*.attention.to_*",)
_NAMED_ALIKE = (  # in diffusers and in the original, but for layers of attention
    *("*.feed_forward.*", "*.attention.to_out.0", "*.adaLN_modulation.0", "cap_embedder.*", "t_embedder.*"),
)
_TOP = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
_IN_ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
_FUSED = ("to_q", "to_k", "to_v")


class ZImage(Family):
    """The base model and Turbo."""

    name = "z-image"
    title = "Z-Image"
    pipeline = "ZImagePipeline"
    network = "ZImageTransformer2DModel"
    diffusers_start = "all_x_embedder."
    text_width = "cap_feat_dim"
    modelspec_implementation = "https://github.com/Tongyi-MAI/Z-Image"
    kohya_name = "zimage"
    modelspec_name = "z-image"
    portable = "ai-toolkit"
    ai_toolkit_naming = "diffusers"
    limits = ProgramLimits(
        diffusers_applies={
            "kohya": (*_NAMED_ALIKE, "*.attention.to_[qkv]"),
            "comfy": _NAMED_ALIKE,
            "ai-toolkit": ("*",),
        },
        diffusers_also_loads={"ai-toolkit": ("lokr",)},
        diffusers_refuses_others=True,
        sd_scripts_applies=None,
    )
    # Shifted as in ComfyUI's `supported_models.ZImage`; scheduler_config.json of the base model has 6, of Turbo 3.
    own_diffusion = Diffusion("flow", FlowSchedule(shift=3.0))
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "layers.*.feed_forward.w*")),
        "transformer": Rule(("layers.*",), linear_only=True),
    }
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen3",
            "qwen_3_4b.safetensors",
            ("text_encoders.qwen3_4b.transformer.",),
            widths=(2560,),
            hub=HubFolder("Comfy-Org/Z-Image/split_files/text_encoders", 8.04),
        )
    }
    autoencoder = replace(FLUX_AUTOENCODER, prefixes=("vae.",))
    routing = Routing(blocks={"layers": {"x": "bt.", "attn_mask": "bt", "freqs_cis": "bt."}})
    clip_types = ("lumina2",)
    own_defaults = Defaults(
        # The layers alone, as in ai-toolkit and musubi-tuner (which excludes refiners and modulation).
        guidance=4.0,  # ComfyUI's template of the base model
        timestep_distribution="logit_normal",  # OneTrainer's preset
    )
    unused_tensors = ("norm_final.weight",)
    distilled = {"turbo": 8}  # steps of ComfyUI's templates
    training_adapters = {"turbo": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"}
    releases = (
        Release(
            name="z-image",
            title="Z-Image",
            about="Photographs and lettering; a good first choice for a card of 12 GB and more.",
            file="z_image_bf16.safetensors",
            hub=HubFolder("Comfy-Org/Z-Image/split_files/diffusion_models", 12.31),
            licence="Apache 2.0",
            card="Tongyi-MAI/Z-Image",
            distilled="Tongyi-MAI/Z-Image-Turbo",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (Signature(title, DENOISER_START + r"layers_\d+_(attention|feed_forward)_", 3840, order=5),)

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if "noise_refiner.0.attention.k_norm.weight" not in shapes or "cap_embedder.1.weight" not in shapes:
            return False
        return _LUMINA_MODULATION not in shapes

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, text_width = shapes["cap_embedder.1.weight"]
        head = shapes["layers.0.attention.q_norm.weight"][0]
        return {
            "dim": width,
            "n_heads": width // head,
            "n_kv_heads": width // head,
            "cap_feat_dim": text_width,
            "in_channels": shapes["x_embedder.weight"][1] // 4,
            "n_layers": block_count(shapes, "layers."),
            "n_refiner_layers": block_count(shapes, "noise_refiner."),
            # 32, 48, 48 for the released head width of 128, in the same proportion for others.
            "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
            # Longer prompts than diffusers' own limit of 1024 tokens, as in ComfyUI.
            "axes_lens": [1536, 512, 512],
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        block, attention, rest = path.partition(".attention.")
        if not attention:
            return OriginalName(path)
        if rest in _FUSED:
            start = _FUSED.index(rest) * denoiser.config.dim
            return OriginalName(f"{block}.attention.qkv", rows=(start, start + denoiser.config.dim))
        return OriginalName(f"{block}.attention.{_IN_ATTENTION[rest]}")

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, text = self.text_encoder(encoders, "text_encoder"), texts["text_encoder"]
        # Brackets and weights are text to a language model.
        ids = encoders.tokenizers["text_encoder"](_TEMPLATE.format(literal_text(text, encoding))).input_ids
        if encoding.follows_diffusers:
            ids = ids[:512]
        return Conditioning({"context": hidden_states(encoder, ids, [_LAYER]).flatten(2)}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        context, mask = conditioning.tensors["context"], conditioning.mask_on_cpu
        texts = list(context) if mask is None else list(map(_attended, context, mask))
        pictures = denoiser(list(latents.unsqueeze(2)), (1 - time).to(latents.dtype), texts, return_dict=False)[0]
        return -torch.stack(pictures).squeeze(2)


def _attended(context: Tensor, mask: Tensor) -> Tensor:
    """The rows of a context (tokens, width) that a mask (tokens,) on the CPU has."""
    places = mask.nonzero()[:, 0].tolist()
    if places == list(range(len(places))):  # padding is behind them
        return context[: len(places)]
    return torch.stack([context[place] for place in places])  # an index would be copied from the host


register(ZImage(), "zimage")
