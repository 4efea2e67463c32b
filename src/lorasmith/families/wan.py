"""Wan 2.1 and 2.2 (Alibaba 2025): rectified-flow transformers of video, which pictures are one frame of.

Text enters by cross-attention that sees 512 rows, of which those after the prompt are zero. Wan 2.2 A14B is two
transformers of one shape, each for a range of noise; 2.2 5B has an autoencoder of its own. Nothing is fused in the
original layout.

Image to video has 20 channels beside the noisy latents: a mask of four, 1 where a frame is known, and the latents of a
clip that is grey but for the known frames. Wan 2.1 also attends to CLIP's states of these frames. In 2.2 5B, of which
there is one model for both, the first frame has no noise and its tokens the time 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import CLIP_VISION, FIRST_FRAME, Conditioning, check_even
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, Encode, Expert, Routing
from lorasmith.families.parts.autoencoders import LATENT_MEAN_22, LATENT_STD_22, QWEN_AUTOENCODER, wan_latents
from lorasmith.families.parts.clip_vision import picture_states
from lorasmith.families.parts.language_models import encode_umt5
from lorasmith.families.slots import (
    IMAGE_ENCODER,
    AutoencoderSlot,
    Components,
    EncoderSlot,
    Encoding,
    HubFolder,
    Release,
    TextEncoders,
)
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_TOKENS = 512  # of text
_HEAD = 128  # width of a head in every size
_PATCH = 4  # numbers of a patch of 1×2×2
_SHIFT = 8.0  # ComfyUI's for KSampler
_TIME_SCALE = 1000.0
_LEAST_SIGMA = 1e-3  # by which a given frame's noise is divided
_MASK = 4  # channels of the mask, one for each frame of a latent
_STATES = 257  # of CLIP for a picture

_ATTENTION = ("blocks.*.attn1.to_*", "blocks.*.attn2.to_*")
_TARGETS = {
    "attention": Rule(_ATTENTION),
    "attention+ff": Rule((*_ATTENTION, "blocks.*.ffn.net.*")),
    "transformer": Rule(("blocks.*",), linear_only=True),
}
_TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}
_PARTS = {
    **{
        f"{ours}.{layer}": f"{theirs}.{name}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, name in (
            *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_MODULATION = {"scale_shift_table": "modulation"}

# diffusers reads kohya's names of a block if all of these are there.
_MATRICES = _TARGETS["attention+ff"].include

# What a tensor's name begins with → the variant that it is a part of.
_VARIANTS = {
    "vace_patch_embedding.": "VACE",
    "control_adapter.": "camera control",
    "casual_audio_encoder.": "speech to video",
    "audio_proj.": "HuMo",
    "face_adapter.": "Animate",
    "patch_embedding_mask.": "SCAIL",
    "patch_embedding_pose.": "SCAIL",
    "patch_embedding_global.": "Dancer",
    "ref_conv.": "Fun control",
}
# Channels beyond the noisy latents: a mask and known frames, or a control video and a first picture.
_KNOWN, _FUN_CONTROL = 20, 32
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


_SMALL = Release(
    name="wan-2.1-1.3b",
    title="Wan 2.1 1.3B",
    about="Short clips; the small one of its family, trained on pictures or clips.",
    file="wan2.1_t2v_1.3B_bf16.safetensors",
    hub=HubFolder("Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/diffusion_models", 2.84),
    licence="Apache 2.0",
    card="Wan-AI/Wan2.1-T2V-1.3B",
    config={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
)

_DEFAULTS = Defaults(
    resolution=640,  # the area of 480×832
    targets="attention+ff",  # what musubi-tuner trains
    guidance=5.0,  # WanPipeline's
    timestep_distribution="shifted",
    frames=33,  # of the 81 that it was trained on, whose activations take a data centre's memory
)
_OF_BLOCKS = rf"{DENOISER_START}blocks_\d+_"
_LAYERS = r"((self|cross)_attn_[qkvo]$|attn[12]_to_|ffn_[02]$|ffn_net_)"


def _diffusion(patches: tuple[int, int]) -> Diffusion:
    """The flow with the shifts of WanPipeline's documentation: 3 at 480p and 5 at 720p, of so many patches."""
    by_size = ResolutionShift(mu=(math.log(3), math.log(5)), patches=patches)
    return Diffusion("flow", FlowSchedule(_SHIFT, resolution_shift=by_size, time_scale=_TIME_SCALE))


def _released(heads: int, inner: int, blocks: int, channels: int) -> dict[str, int]:
    sizes = {"num_attention_heads": heads, "ffn_dim": inner, "num_layers": blocks}
    return {**sizes, "in_channels": channels, "out_channels": channels}


def _experts(border: float) -> tuple[Expert, ...]:
    """The transformers of A14B, whose parts of the noise meet at the boundary of its pipeline."""
    return (Expert("high_noise", (border, 1.0), "transformer"), Expert("low_noise", (0.0, border), "transformer_2"))


class Wan(Family):
    """Wan 2.1 and 2.2 A14B from text; the other models are instances with some attributes of their own."""

    name = "wan"
    title = "Wan"
    pipeline = _PIPELINES[0]
    modelspec_implementation = "https://github.com/Wan-Video/Wan2.1"
    kohya_name = modelspec_name = "wan2.1"  # musubi-tuner's, of A14B, too
    civitai_name: str | None = None  # sizes and versions are several there
    known_channels = 0  # beside the noisy latents: a mask and known frames
    network = "WanTransformer3DModel"
    diffusers_start = "condition_embedder."
    text_width = "text_dim"
    usual_tokens = _TOKENS
    draws_clips = True
    portable = "ai-toolkit"
    limits = ProgramLimits(
        unknown_to_comfyui=("*",),
        diffusers_applies={
            "kohya": _MATRICES,
            "comfy": _MATRICES,
            "ai-toolkit": (*_MATRICES, "condition_embedder.*", "proj_out"),
        },
        diffusers_refuses_others=True,
        diffusers_refuses_unknown=True,
        sd_scripts_applies=None,
    )
    targets = _TARGETS
    text_encoders = {
        "text_encoder": EncoderSlot(
            "umt5xxl",
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
            ("text_encoders.umt5xxl.transformer.",),
            hub=HubFolder("Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/text_encoders", 6.74),
        )
    }
    clip_types = ("wan",)
    routing = Routing(blocks={"blocks": {"hidden_states": "bp.", "temb": "bp..", "rotary_emb": "bp.."}})
    distilled = dict.fromkeys(
        ("lightx2v", "stepdistill", "causvid", "fastwan", "self_forcing", "turbo"), 4
    )  # steps of ComfyUI's templates
    predicts_by_length = True
    repeatable_context = False  # for prompts beyond 512 tokens, whose common multiple is too long; see `predict`

    autoencoder = replace(
        QWEN_AUTOENCODER,
        usual_file="wan_2.1_vae.safetensors",
        latent=wan_latents(time_downscale=4),
        hub=HubFolder("Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/vae", 0.25),
    )
    experts = _experts(0.875)
    own_diffusion = _diffusion((1560, 3600))
    own_defaults = _DEFAULTS
    lora_signatures = (Signature(title, _OF_BLOCKS + _LAYERS, order=5),)
    released = _released(40, 13824, 40, autoencoder.channels)
    releases = (_SMALL,)

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if not {"head.modulation", "head.head.weight", "patch_embedding.weight"} <= shapes.keys():
            return False
        channels, further = self.autoencoder.channels, shapes["patch_embedding.weight"][1] - self.autoencoder.channels
        return shapes["head.head.weight"][0] == _PATCH * channels and (further == _KNOWN) == bool(self.known_channels)

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        if not set(_PIPELINES) & set(configs.classes):
            if other := next((name for name in configs.classes if name.startswith("Wan") and "Pipeline" in name), None):
                raise ModelError(
                    f"{configs.title} must be a model of {' or '.join(_PIPELINES)}, but its pipeline is {other}; "
                    "choose a model such as Wan2.1-T2V-1.3B-Diffusers"
                )
            return False
        channels = self.autoencoder.channels + self.known_channels
        return bool(configs.of(self.denoiser_folder)["in_channels"] == channels)

    def controls_of(self, denoiser: nn.Module, names: Sequence[str], edit: str | None = None) -> ControlForm | None:
        if not self.known_channels:
            return super().controls_of(denoiser, names, edit) if edit is not None else None
        last, first = self.controls
        if edit is None and _config(denoiser).pos_embed_seq_len is not None:
            return last
        return super().controls_of(denoiser, names, edit) or first

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        name = checkpoint.path.name.casefold()
        if self.known_channels and "fun" in name and "inp" in name:  # of the same tensors
            raise ModelError(
                f"{checkpoint.path.name} must be Wan's image to video, but is Fun inpainting by its name; choose a "
                "file such as wan2.2_i2v_high_noise_14B"
            )
        return super().diffusion(checkpoint)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, in_channels = shapes["patch_embedding.weight"][:2]
        channels = self.autoencoder.channels
        variant = next(
            (name for sign, name in _VARIANTS.items() if any(name.startswith(sign) for name in shapes)), None
        )
        if variant is not None or in_channels != channels + self.known_channels:
            variant = variant or ("Fun control" if in_channels == channels + _FUN_CONTROL else "an unknown variant")
            raise ModelError(
                f"{self.title} must be the text-to-video or image-to-video model, but this one is {variant} and takes "
                f"{in_channels} channels; choose a file such as wan2.1_t2v_1.3B, wan2.2_i2v_high_noise_14B or "
                "wan2.2_ti2v_5B"
            )
        of_pictures = {}
        if "img_emb.proj.1.weight" in shapes:
            of_pictures = {"image_dim": shapes["img_emb.proj.1.weight"][1], "added_kv_proj_dim": width}
        if "img_emb.emb_pos" in shapes:
            of_pictures["pos_embed_seq_len"] = shapes["img_emb.emb_pos"][1]
        return {
            "in_channels": in_channels,
            "out_channels": channels,
            "num_layers": block_count(shapes, "blocks."),
            "attention_head_dim": _HEAD,
            "num_attention_heads": width // _HEAD,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            **of_pictures,
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        if not path:
            return OriginalName("head", parameters=_MODULATION)
        if path == "condition_embedder.image_embedder":
            return OriginalName("img_emb", parameters={"pos_embed": "emb_pos"})
        blocks, index, *part = path.split(".", 2)
        stem = f"{blocks}.{index}"
        return OriginalName(f"{stem}.{_PARTS[part[0]]}") if part else OriginalName(stem, parameters=_MODULATION)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        shown = _cleaned(text) if encoding.follows_diffusers else text
        context = encode_umt5(shown, tokenizer, encoder, **encoding.tokens_of("umt5xxl", _TOKENS, _TOKENS))
        return Conditioning({"context": context}, text)

    def most_tokens(self, denoiser: nn.Module) -> int | None:
        return _TOKENS if self.known_channels and _config(denoiser).image_dim is not None else None

    def encoder_width(self, denoiser: nn.Module, component: str) -> int | None:
        return _config(denoiser).image_dim if component == IMAGE_ENCODER else super().encoder_width(denoiser, component)

    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        shapes, config = super().conditioning_shapes(denoiser), _config(denoiser)
        if not self.known_channels or config.image_dim is None:
            return shapes
        return {**shapes, CLIP_VISION: (1, config.pos_embed_seq_len or _STATES, config.image_dim)}

    def picture_inputs(
        self, form: ControlForm, components: Components, encode: Encode, pixels: Tensor, mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        if pixels.ndim == 4 or pixels.shape[2] == 1:  # a picture has no frames to draw from its first
            return {}
        if not self.known_channels:
            return {FIRST_FRAME: encode(pixels[:, :, :1])}
        places = list(form.frames)
        clip, is_grey = torch.zeros_like(pixels), torch.ones(pixels.shape[2])
        clip[:, :, places], is_grey[places] = pixels[:, :, places], 0.0
        by_latent = torch.cat((is_grey[:1].repeat(_MASK - 1), is_grey)).reshape(1, -1, _MASK).transpose(1, 2)
        tensors = {"known": _known(encode(clip), by_latent[..., None, None])}
        if components.image_encoder is not None and CLIP_VISION in self.conditioning_shapes(components.denoiser):
            states = [picture_states(components.image_encoder, pixels[:, :, place]) for place in places]
            tensors[CLIP_VISION] = torch.cat(states, dim=1)
        return tensors

    def known_latents(self, denoiser: nn.Module, latents: Tensor, mask: Tensor) -> Tensor | None:
        return _known(latents, mask) if self.known_channels else None

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title, pixels=2 * self.autoencoder.downscale)
        context, tensors = conditioning.tensors["context"], conditioning.tensors
        # Time stays in fp32, since bf16 has no number between 996 and 1000.
        time = time.to(latents.device)
        inputs = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": context}
        lengths = None if conditioning.mask is None else conditioning.lengths
        if self.known_channels:
            known = tensors.get("known")
            if known is None:  # as in ComfyUI
                known = latents.new_zeros(len(latents), _KNOWN, *latents.shape[2:])
            _check_place("known", known, latents)
            inputs["hidden_states"] = torch.cat((latents, known), dim=1)
            if _config(denoiser).image_dim is not None:
                inputs["encoder_hidden_states_image"] = self._picture_states(denoiser, tensors)
                # diffusers finds the text behind the picture by its length.
                inputs["encoder_hidden_states"], lengths = _of_rows(context, _TOKENS), None
        clean = tensors.get(FIRST_FRAME) if self.controls and not self.known_channels else None
        if clean is not None:
            count = clean.shape[2]
            _check_place(FIRST_FRAME, clean, latents[:, :, :count])
            inputs["hidden_states"] = torch.cat((clean, latents[:, :, count:]), dim=2)
            times = time[:, None].repeat(1, latents[0, 0].numel() // _PATCH)
            times[:, : clean[0, 0].numel() // _PATCH] = 0
            inputs["timestep"] = times
        if lengths is None:
            prediction = _predicted(denoiser, inputs)
        else:
            # The network has no mask: contexts of one length at a time, each without its padding.
            predicted: dict[int, Tensor] = {}
            for length in sorted(set(lengths)):
                rows = [row for row, frames in enumerate(lengths) if frames == length]
                # An index would be copied from the host.
                parts = {name: torch.stack([tensor[row] for row in rows]) for name, tensor in inputs.items()}
                parts["encoder_hidden_states"] = parts["encoder_hidden_states"][:, :length]
                predicted |= zip(rows, _predicted(denoiser, parts), strict=True)
            prediction = torch.stack([predicted[row] for row in range(len(lengths))])
        if clean is None:
            return prediction
        # What leads from any noise to the given frame.
        sigma = (time / _TIME_SCALE).clamp(min=_LEAST_SIGMA).view(-1, 1, 1, 1, 1)
        away = ((latents[:, :, :count].float() - clean.float()) / sigma).to(prediction.dtype)
        return torch.cat((away, prediction[:, :, count:]), dim=2)

    def _picture_states(self, denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """States of one picture, or of two as diffusers takes them, one after the other in the batch."""
        states, positions = tensors.get(CLIP_VISION), _config(denoiser).pos_embed_seq_len
        if states is None or (positions is not None and states.shape[1] != positions):
            count = "none" if states is None else f"{states.shape[1]} rows"
            needed = "two pictures" if positions is not None else "a picture"
            raise DataError(
                f"{self.title} needs CLIP's states of {needed} beside a prompt, got {count}; encode the frames of the "
                f"clip with the image encoder, usually clip_vision_h.safetensors"
            )
        return states if positions is None else states.reshape(-1, positions // 2, states.shape[-1])


def _known(latents: Tensor, mask: Tensor) -> Tensor:
    """The channels beside the noisy latents, (batch, 4 + 16, frames, height, width).

    latents: (batch, 16, frames, height, width) of a clip that is grey but for its known frames; mask: (batch or 1, 4 or
    1, frames, height or 1, width or 1), 1 where it is grey.
    """
    is_known = (1 - mask.to(latents)).expand(len(latents), _MASK, *latents.shape[2:])
    return torch.cat((is_known, latents), dim=1)


def _config(denoiser: Any) -> Any:
    """Settings of the denoiser."""
    return denoiser.config


def _predicted(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    prediction: Tensor = denoiser(**inputs, return_dict=False)[0]
    return prediction


def _of_rows(context: Tensor, rows: int) -> Tensor:
    """(batch, tokens, width) cut, or filled up with zeros."""
    return nn.functional.pad(context[:, :rows], (0, 0, 0, max(0, rows - context.shape[1])))


def _check_place(name: str, tensor: Tensor, latents: Tensor) -> None:
    if tensor.shape[2:] != latents.shape[2:]:
        raise DataError(
            f"{name} of a conditioning must have the frames and size of the latents, {_sizes(latents)}, got "
            f"{_sizes(tensor)}; encode the frames at the size and length of the clip"
        )


def _sizes(latents: Tensor) -> str:
    return "×".join(map(str, latents.shape[2:]))


def _cleaned(text: str) -> str:
    """The prompt without HTML's entities, with single spaces, as WanPipeline cleans it."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(text)  # type: ignore[no-any-return]


_FIRST = ControlForm(source="first frame", is_required=True, most=2, most_pixels=832 * 480)
_FROM_PICTURES = Wan(
    name="wan-i2v",
    title="Wan image to video",
    pipeline=_PIPELINES[1],
    kohya_name="wan2.1-i2v",  # a name of our own
    modelspec_name="wan2.1-i2v",
    known_channels=_KNOWN,
    experts=_experts(0.9),
    controls=(replace(_FIRST, name="flf2v", source="first and last frame"), _FIRST),
    image_encoder=EncoderSlot("clip_vision_h", "clip_vision_h.safetensors"),
    lora_signatures=(
        Signature("Wan image to video", _OF_BLOCKS + r"(cross_attn_[kv]_img|attn2_add_[kv]_proj)", order=3),
        Signature("Wan image to video", _OF_BLOCKS + _LAYERS, order=4, architecture="wan2.1-i2v"),
    ),
    # of Wan 2.1, whose layers are those of 2.2 and some more
    released={**Wan.released, "in_channels": 16 + _KNOWN, "image_dim": 1280, "added_kv_proj_dim": 40 * _HEAD},
    releases=(),
)
_SMALL_22 = Wan(
    name="wan22-5b",
    title="Wan 2.2 5B",
    modelspec_implementation="https://github.com/Wan-Video/Wan2.2",
    kohya_name="wan2.2",
    modelspec_name="wan2.2",
    civitai_name="Wan Video 2.2 TI2V-5B",
    autoencoder=AutoencoderSlot(
        "wan22",
        channels=48,
        usual_file="wan2.2_vae.safetensors",
        prefixes=("vae.",),
        downscale=16,
        latent=wan_latents(LATENT_MEAN_22, LATENT_STD_22, downscale=16, time_downscale=4),
    ),
    experts=(),
    controls=(
        ControlForm(
            name="i2v", pipeline=_PIPELINES[1], source="first frame", most=1, most_pixels=1280 * 704, multiple=32
        ),
    ),
    own_diffusion=_diffusion((390, 900)),  # a patch is 32 pixels wide, those of the other models 16
    own_defaults=replace(_DEFAULTS, resolution=960, pixel_multiple=32, frame_rate=24.0),  # the area of 704×1280
    lora_signatures=(
        Signature(
            "Wan 2.2 5B",
            _OF_BLOCKS + r"((self|cross)_attn_q|self_attn_[kvo]|attn1_to_|attn2_to_q|ffn_0|ffn_net_0)",
            24 * _HEAD,
            order=4,
        ),
    ),
    released=_released(24, 14336, 30, 48),
    releases=(),
)

register(Wan(), "wan2.1")
register(_FROM_PICTURES, "wan2.2-i2v")
register(_SMALL_22, "wan2.2-5b")
