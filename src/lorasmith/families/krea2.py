"""Krea 2 (Krea 2026): a rectified-flow transformer in one stream that reads twelve layers of a language model.

A small transformer of its own fuses the layers of text; then text and packed latents run together through the blocks.
Nothing is fused in the original layout. Turbo, which is distilled, has the tensors of Raw; LoRAs are trained on Raw.

All models take references, each with an index of its own, which the language model sees too. Its prompt with pictures
is that of ComfyUI's TextEncodeQwenImageEditPlus, in ComfyUI's template for references; ai-toolkit keeps the prompt of
text alone. References are modulated at time 0, as in that template and in ai-toolkit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import AT_ZERO, BY_INDEX, Conditioning, check_even
from lorasmith.families.files.original_weights import block_count, norm_name
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import QWEN_AUTOENCODER
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.flux_layout import image_positions, packed_latents, unpacked_latents
from lorasmith.families.parts.language_models import (
    ANSWER,
    SYSTEM,
    SYSTEM_TOKENS,
    chat_of,
    hidden_states,
    seen_from,
    sight_of,
)
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_LAYERS = tuple(range(2, 36, 3))  # of the encoder's states
_MU = 1.15  # ComfyUI's shift for KSampler
_RESOLUTION_SHIFT = ResolutionShift(patches=(256, 6400))  # Krea2Pipeline's for Raw

_ATTENTION = ("transformer_blocks.*.attn.to_*",)
_TOP = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.norm": "txtmlp.0",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "final_layer.linear": "last.linear",
    "final_layer.norm": "last.norm",
}
_PARTS = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "attn.norm_q": "attn.qknorm.qnorm",
    "attn.norm_k": "attn.qknorm.knorm",
    "norm1": "prenorm",
    "norm2": "postnorm",
    "ff": "mlp",
}
_BLOCKS = {
    "transformer_blocks": "blocks",
    "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
    "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
}
# The modulation of a block and of the last layer is a parameter here, and a layer's tensor in the original.
_MODULATION = {"scale_shift_table": "mod.lin"}
_LAST_MODULATION = {"scale_shift_table": "modulation.lin"}


class Krea2(Family):
    """Krea 2 Raw and Turbo."""

    name = "krea2"
    title = "Krea 2"
    pipeline = "Krea2Pipeline"
    network = "lorasmith.families.parts.controls_at_zero.Krea2Transformer"
    text_width = "text_hidden_dim"
    modelspec_implementation = "https://github.com/krea-ai/krea-2"
    kohya_name = "krea2"
    modelspec_name = "krea-2"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        diffusers_applies={"ai-toolkit": ("*",)}, diffusers_refuses_others=True, sd_scripts_applies=None
    )
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(_MU, resolution_shift=_RESOLUTION_SHIFT))
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "transformer_blocks.*.ff.*")),
        "transformer": Rule(("transformer_blocks.*", "text_fusion.*", "txt_in.*"), linear_only=True),
    }
    signs = ("txtfusion.projector.weight", "blocks.0.attn.gate.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen3vl",
            "qwen3vl_4b_bf16.safetensors",
            ("text_encoders.qwen3vl_4b.transformer.",),
            hub=HubFolder("Comfy-Org/Krea-2/text_encoders", 8.88),
        )
    }
    autoencoder = QWEN_AUTOENCODER
    routing = Routing(
        blocks={"transformer_blocks": {"hidden_states": "bt.", "image_rotary_emb": "t.", "attention_mask": "b..t"}},
        text="first",
    )
    clip_types = ("krea2",)
    own_defaults = Defaults(
        targets="all-linear",  # the 264 layers that the authors recommend; ai-toolkit's and musubi-tuner's, too
        guidance=5.5,  # 4.5 in Krea2Pipeline, which counts from the conditional prediction
        timestep_distribution="logit_normal",  # OneTrainer's preset
    )
    distilled = {"turbo": 8}  # steps of ComfyUI's templates
    training_adapters = {"turbo": "ostris/krea2_turbo_training_adapter/krea2_turbo_training_adapter_v1.safetensors"}
    controls = (ControlForm(at_zero=True, sight=sight_of(pixels=384**2, multiple=32)),)
    control_methods = (BY_INDEX, AT_ZERO)
    releases = (
        Release(
            name="krea-2",
            title="Krea 2 Raw",
            about="Photographs and many styles; the base of the distilled Turbo.",
            file="krea2_raw_bf16.safetensors",
            hub=HubFolder("Comfy-Org/Krea-2/diffusion_models", 26.28),
            licence="Krea 2 Community License",
            card="krea/Krea-2-Raw",
            distilled="krea/Krea-2-Turbo",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(
            title, DENOISER_START + r"(transformer_)?blocks_\d+_(attn_(wq|gate|to_gate)|mlp_gate|ff_gate)", order=4
        ),
        Signature(title, r"(txtfusion|text_fusion)_"),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        head = shapes[norm_name("blocks.0.attn.qknorm.qnorm", shapes)][0]
        fusion = "txtfusion.layerwise_blocks.0."
        text_head = shapes[norm_name(f"{fusion}attn.qknorm.qnorm", shapes)][0]
        return {
            "in_channels": shapes["first.weight"][1],
            "num_layers": block_count(shapes, "blocks."),
            "attention_head_dim": head,
            "num_attention_heads": shapes["blocks.0.attn.wq.weight"][0] // head,
            "num_key_value_heads": shapes["blocks.0.attn.wk.weight"][0] // head,
            "intermediate_size": shapes["blocks.0.mlp.gate.weight"][0],
            "timestep_embed_dim": shapes["tmlp.0.weight"][1],
            "text_hidden_dim": shapes["txtmlp.1.weight"][1],
            "num_text_layers": shapes["txtfusion.projector.weight"][1],
            "text_num_attention_heads": shapes[f"{fusion}attn.wq.weight"][0] // text_head,
            "text_num_key_value_heads": shapes[f"{fusion}attn.wk.weight"][0] // text_head,
            "text_intermediate_size": shapes[f"{fusion}mlp.gate.weight"][0],
            "num_layerwise_text_blocks": block_count(shapes, "txtfusion.layerwise_blocks."),
            "num_refiner_text_blocks": block_count(shapes, "txtfusion.refiner_blocks."),
            # 32, 48, 48 for the released head width of 128, in the same proportion for others.
            "axes_dims_rope": (head // 4, 3 * head // 8, 3 * head // 8),
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        if path == "final_layer":
            return OriginalName("last", parameters=_LAST_MODULATION)
        if path == "text_fusion.projector":
            return OriginalName("txtfusion.projector")
        kind, index, part = re.fullmatch(r"(\D+)\.(\d+)\.?(.*)", path).groups()  # type: ignore[union-attr]
        stem = f"{_BLOCKS[kind]}.{index}"
        if not part:
            return OriginalName(stem, parameters=_MODULATION)
        known = max((prefix for prefix in _PARTS if f"{part}.".startswith(f"{prefix}.")), key=len)
        return OriginalName(f"{stem}.{_PARTS[known]}{part.removeprefix(known)}")

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        return self.encode_seen(encoders, texts, encoding, ())

    def encode_seen(
        self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding, pictures: Sequence[Tensor]
    ) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        ids = tokenizer(chat_of(literal_text(text, encoding))).input_ids
        start = seen_from(tokenizer, ids)
        if encoding.follows_diffusers and not pictures:
            answer, start = tokenizer(ANSWER).input_ids, SYSTEM_TOKENS
            ids = [*tokenizer(SYSTEM + text).input_ids[: 512 + SYSTEM_TOKENS - len(answer)], *answer]
        states = hidden_states(encoder, ids, _LAYERS, pictures=pictures)
        return Conditioning({"context": states[:, start:].flatten(2)}, text)

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        return {"context": (1, 64, denoiser.config.num_text_layers * denoiser.config.text_hidden_dim)}

    def predict(self, denoiser: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        pictures = [control.squeeze(2) for control in (latents, *conditioning.controls)]
        for picture in pictures:
            check_even(picture, self.title)
        context = conditioning.tensors["context"]
        context = context.reshape(*context.shape[:2], denoiser.config.num_text_layers, denoiser.config.text_hidden_dim)
        positions = [
            image_positions(picture.shape[-2] // 2, picture.shape[-1] // 2, latents.device, (index, 0, 0))
            for index, picture in enumerate(pictures)
        ]
        clean = sum(map(len, positions[1:])) if AT_ZERO in conditioning.tensors else 0
        prediction = denoiser(
            hidden_states=torch.cat([packed_latents(picture) for picture in pictures], dim=1),
            encoder_hidden_states=context,
            timestep=time.to(latents.dtype),
            position_ids=torch.cat((positions[0].new_zeros(context.shape[1], 3), *positions)),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
            **({"clean_tokens": clean} if clean else {}),
        )[0][:, : len(positions[0])]
        return unpacked_latents(prediction, *latents.shape[-2:]).unsqueeze(2)


register(Krea2(), "krea-2")
