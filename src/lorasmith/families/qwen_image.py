"""Qwen-Image (Alibaba 2025, arXiv:2508.02324): a rectified-flow transformer with a stream each for text and picture.

Both streams keep weights of their own through all blocks and meet in joint attention. Text is the last state of
Qwen2.5-VL. Files have the names of diffusers' class, so nothing is fused or renamed. The models of August and December
2025 (`2512`) have the same tensors, and so have those that edit: Qwen-Image-Edit (August), 2509 and 2511. These have
controls, which the text encoder sees too. 2511 gives them the time of clean pictures; ComfyUI's files of it may say so.

Tokens of a picture are counted from its middle outwards: where a side has an odd number of them, the class of the
authors counts from one further out than ComfyUI does, so buckets and controls have even sides. Those of text follow the
longer half side of the picture that is drawn, as in ComfyUI, where most LoRAs are used. In the class of the authors
they follow that of the largest picture, which is the same unless a control has a longer side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import AT_ZERO, BY_INDEX, Conditioning, check_even
from lorasmith.families.files.original_weights import block_count, norm_name
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import QWEN_AUTOENCODER
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.flux_layout import packed_latents, rope_axes, unpacked_latents
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
from lorasmith.formats.names import ProgramLimits
from lorasmith.formats.spelling import Signature

_TOKENS = 512  # QwenImagePipeline's longest prompt unless given another
_MU = 1.15  # ComfyUI's shift for KSampler; its template sets a linear one of 3.1
# scheduler_config.json of the released folder, and musubi-tuner's `qwen_shift`.
_RESOLUTION_SHIFT = ResolutionShift(mu=(0.5, 0.9), patches=(256, 8192))

_ATTENTION = ("transformer_blocks.*.attn.to_*", "transformer_blocks.*.attn.add_*_proj")
_MLP = ("transformer_blocks.*.img_mlp.net.*", "transformer_blocks.*.txt_mlp.net.*")
_MARK_2511 = "__index_timestep_zero__"  # empty tensor of Qwen-Image-Edit 2511
# Tensors that other models of this architecture have besides → what these are.
_VARIANTS = {"time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered, which draws several layers"}
_WIDTH = 3072
_POSITIONS = 4096  # of the rotary embedding; those of text follow half of the longest side

_EDIT = ControlForm(
    name="edit",
    pipeline="QwenImageEditPipeline",
    modelspec_name="Qwen-Image-Edit",  # musubi-tuner's, as those of the others
    is_required=True,
    is_aligned=True,
    is_enlarged=True,
    most=1,
    multiple=32,
    sight=sight_of(pixels=1024**2, multiple=28, is_numbered=False),
)
_EDIT_2509 = replace(
    _EDIT,
    name="edit-2509",
    pipeline="QwenImageEditPlusPipeline",
    modelspec_name="Qwen-Image-Edit-Plus",
    most=ControlForm.most,
    sight=sight_of(pixels=384**2, multiple=28),
)
_EDIT_2511 = replace(_EDIT_2509, name="edit-2511", modelspec_name="Qwen-Image-Edit-2511", at_zero=True)
_EDIT_NAMES = {"2511": _EDIT_2511, "2509": _EDIT_2509, "plus": _EDIT_2509, "firered": _EDIT_2509, "": _EDIT}


class QwenImage(Family):
    """Qwen-Image, Qwen-Image 2512, and Qwen-Image-Edit of August 2025, 2509 and 2511."""

    name = "qwen-image"
    title = "Qwen-Image"
    pipeline = "QwenImagePipeline"
    network = "lorasmith.families.parts.controls_at_zero.QwenImageTransformer"
    text_width = "joint_attention_dim"
    modelspec_implementation = "https://github.com/QwenLM/Qwen-Image"
    kohya_name = "qwen_image"
    modelspec_name = "Qwen-Image"
    portable = "kohya"  # musubi-tuner's own, which reads no other without a conversion
    limits = ProgramLimits(diffusers_refuses_others=True, sd_scripts_applies=None)
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(_MU, resolution_shift=_RESOLUTION_SHIFT))
    civitai_name = "Qwen"
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, *_MLP)),
        "transformer": Rule(("transformer_blocks.*",), linear_only=True),
    }
    signs = ("txt_norm.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen25vl",
            "qwen_2.5_vl_7b.safetensors",
            ("text_encoders.qwen25_7b.transformer.",),
            hub=HubFolder("Comfy-Org/Qwen-Image/split_files/text_encoders", 16.58),
        )
    }
    autoencoder = QWEN_AUTOENCODER
    routing = Routing(
        blocks={"transformer_blocks": {"hidden_states": "bp.", "image_rotary_emb": ("p.", ""), "modulate_index": "bp"}},
        text="first",
    )
    clip_types = ("qwen_image",)
    own_defaults = Defaults(
        pixel_multiple=32,  # an even number of tokens on each side
        learning_rate=1e-4,  # ai-toolkit's; musubi-tuner's guide has 5e-5, OneTrainer's preset 3e-4
        targets="attention+ff",  # musubi-tuner: all of the blocks but the modulation
        guidance=4.0,  # QwenImagePipeline and ComfyUI's template
        timestep_distribution="logit_normal",  # OneTrainer's preset
    )
    distilled = {"lightning": 8, "distill": 15, "turbo": 8}  # steps of ComfyUI's templates
    controls = (_EDIT_2511, _EDIT_2509, _EDIT)
    control_methods = (BY_INDEX, AT_ZERO)
    unused_tensors = (_MARK_2511,)
    releases = (
        Release(
            name="qwen-image",
            title="Qwen-Image",
            about="Long prompts and lettering, also in Chinese; for large cards.",
            file="qwen_image_bf16.safetensors",
            hub=HubFolder("Comfy-Org/Qwen-Image/split_files/diffusion_models", 40.86),
            licence="Apache 2.0",
            card="Qwen/Qwen-Image",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(title, r"(^|_)transformer_blocks_\d+_(img_mlp|txt_mlp|img_mod|txt_mod)_", order=2),
        # Flux.1 has 19 blocks of this kind, Qwen-Image 60.
        Signature(title, r"(^|_)transformer_blocks_(19|[2-5]\d)_attn_add_q_proj", _WIDTH, order=3),
    )

    def controls_of(self, denoiser: Any, names: Sequence[str], edit: str | None = None) -> ControlForm | None:
        if edit is not None:
            return super().controls_of(denoiser, names, edit)
        if denoiser.config.zero_cond_t:
            return _EDIT_2511
        named = next((name for name in map(str.casefold, names) if "edit" in name), None)
        return next((form for part, form in _EDIT_NAMES.items() if named is not None and part in named), None)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        head = shapes[norm_name("transformer_blocks.0.attn.norm_q", shapes)][0]
        width, in_channels = shapes["img_in.weight"]
        variant = next((what for tensor, what in _VARIANTS.items() if tensor in shapes), None)
        if variant is None and in_channels != 64:
            variant = f"a variant with {in_channels} input channels"
        if variant is not None:
            raise ModelError(
                f"this model is {variant}, but only text-to-image and edit models with 64 input channels are "
                f"supported; train on {self.title}, {self.title} 2512 or {self.title}-Edit"
            )
        return {
            "in_channels": in_channels,
            "out_channels": shapes["proj_out.weight"][0] // 4,
            "num_layers": block_count(shapes, "transformer_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "axes_dims_rope": rope_axes(head),
            "zero_cond_t": _MARK_2511 in shapes,
        }

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
            ids, start = tokenizer(f"{SYSTEM}{text}{ANSWER}").input_ids[: SYSTEM_TOKENS + _TOKENS], SYSTEM_TOKENS
        states = hidden_states(encoder, ids, [-1], pictures=pictures)
        return Conditioning({"context": states[:, start:].flatten(2)}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        pictures = [control.squeeze(2) for control in (latents, *conditioning.controls)]
        for picture in pictures:
            check_even(picture, self.title)
        shapes = [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures]
        _, height, width = shapes[0]
        context = conditioning.tensors["context"]
        if context.shape[1] > (longest := _POSITIONS - max(height, width) // 2):
            raise DataError(
                f"{self.title} takes prompts of at most {longest} tokens for this size of picture, got "
                f"{context.shape[1]}; shorten the prompt"
            )
        is_at_zero = len(pictures) > 1 and AT_ZERO in conditioning.tensors
        with _controls_at_zero(denoiser, is_at_zero):
            prediction = denoiser(
                hidden_states=torch.cat([packed_latents(picture) for picture in pictures], dim=1),
                encoder_hidden_states=context,
                encoder_hidden_states_mask=conditioning.mask,
                timestep=time.to(latents.dtype),
                img_shapes=[shapes] * len(latents),
                return_dict=False,
            )[0][:, : height * width]
        return unpacked_latents(prediction, 2 * height, 2 * width).unsqueeze(2)


@contextlib.contextmanager
def _controls_at_zero(denoiser: Any, is_on: bool) -> Iterator[None]:
    """Inside the context, calls of the denoiser modulate controls at time 0, or like the picture."""
    before, denoiser.zero_cond_t = denoiser.zero_cond_t, is_on
    try:
        yield
    finally:
        denoiser.zero_cond_t = before


register(QwenImage(), "qwen_image")
