"""HunyuanVideo 1.5 (Tencent 2025): a rectified-flow transformer of video with a stream each for text and video.

Text is a state of Qwen2.5-VL, refined by two blocks of its own; what a prompt has in quotation marks is read by ByT5 as
well, byte by byte, as text to draw. Beside the noisy latents the network has channels for a first picture and its mask,
which are zero for text to video, and SigLIP's states of the picture enter as text does. Only names tell files of image
to video from those of text to video.

The original layout is that of ComfyUI's model, which fuses query, key and value. Its files have the authors' names with
the same fusion, those of the authors have no fusion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import DataError, ModelError
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import CLIP_VISION, Conditioning
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, Encode, LatentFormat, Routing
from lorasmith.families.parts.clip_vision import picture_states
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.flux_layout import DOUBLE_ATTENTION, DOUBLE_FEED_FORWARD, in_double_block, rope_axes
from lorasmith.families.parts.language_models import ANSWER, encode_umt5, hidden_states, seen_from
from lorasmith.families.slots import IMAGE_ENCODER, AutoencoderSlot, Components, EncoderSlot, Encoding, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_HEAD, _WIDTH = 128, 2048  # of a head, and of the released model
_LAYER = -3  # of Qwen's states
_SHIFT = 7.0  # ComfyUI's for KSampler
_TIMES = 1000.0  # the network's time at pure noise
# Of the authors' table: 5 at 480p and 9 at 720p, where a patch is one latent.
_RESOLUTION_SHIFT = ResolutionShift(mu=(math.log(5), math.log(9)), patches=(1560, 3600), patch=1)

_TOKENS, _DROPPED, _GLYPHS = 1000, 108, 256  # HunyuanVideo15Pipeline's: of a prompt, its template and quoted text
_ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
_SYSTEM = "You are a helpful assistant. Describe the video by detailing the following aspects:"
_QUOTES = (('"', '"'), ("‘", "’"), ("“", "”"))
_TURN = "<|im_start|>"

_ATTENTION = ("transformer_blocks.*.attn.to_*", "transformer_blocks.*.attn.add_*_proj")
_FEED_FORWARD = ("transformer_blocks.*.ff.net.*", "transformer_blocks.*.ff_context.net.*")
_MODULATION = ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear")

# Our path → ComfyUI's, and the authors' where that differs.
_TOP = {
    "x_embedder.proj": ("img_in.proj",),
    "time_embed.timestep_embedder.linear_1": ("time_in.in_layer", "time_in.mlp.0"),
    "time_embed.timestep_embedder.linear_2": ("time_in.out_layer", "time_in.mlp.2"),
    **{
        f"context_embedder.time_text_embed.{ours}_embedder.linear_{number}": (
            f"txt_in.{theirs}_embedder.{layer}",
            f"txt_in.{theirs}_embedder.{own}",
        )
        for ours, theirs, number, layer, own in (
            ("timestep", "t", 1, "in_layer", "mlp.0"),
            ("timestep", "t", 2, "out_layer", "mlp.2"),
            ("text", "c", 1, "in_layer", "linear_1"),
            ("text", "c", 2, "out_layer", "linear_2"),
        )
    },
    "context_embedder.proj_in": ("txt_in.input_embedder",),
    "context_embedder_2.norm": ("byt5_in.layernorm",),
    **{f"context_embedder_2.linear_{number}": (f"byt5_in.fc{number}",) for number in (1, 2, 3)},
    "image_embedder.norm_in": ("vision_in.proj.0",),
    "image_embedder.linear_1": ("vision_in.proj.1",),
    "image_embedder.linear_2": ("vision_in.proj.3",),
    "image_embedder.norm_out": ("vision_in.proj.4",),
    "cond_type_embed": ("cond_type_embedding",),
    "norm_out.linear": ("final_layer.adaLN_modulation.1",),
    "proj_out": ("final_layer.linear",),
}
_DOUBLE = {
    **DOUBLE_ATTENTION,
    **DOUBLE_FEED_FORWARD,
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "self_attn.proj",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm_out.linear": "adaLN_modulation.1",
}
# In blocks: ends of ComfyUI's names → the authors'.
_AUTHORS = {
    "_attn.qkv": "_attn_qkv",
    "_attn.proj": "_attn_proj",
    "_attn.norm.query_norm": "_attn_q_norm",
    "_attn.norm.key_norm": "_attn_k_norm",
    "_mod.lin": "_mod.linear",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


class HunyuanVideo15(Family):
    """HunyuanVideo 1.5."""

    name = "hunyuan-video15"
    title = "HunyuanVideo 1.5"
    pipeline = "HunyuanVideo15Pipeline"
    network = "lorasmith.families.parts.masked_transformers.MaskedHunyuanVideo15"
    draws_clips = True
    modelspec_implementation = "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5"
    kohya_name = modelspec_name = "hunyuan-video-1.5"
    limits = ProgramLimits(unknown_to_comfyui=("*",), diffusers_applies={}, sd_scripts_applies=None)
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, *_FEED_FORWARD)),
        "transformer": Rule((*_ATTENTION, *_FEED_FORWARD, *_MODULATION)),
    }
    signs = ("cond_type_embedding.weight", "img_in.proj.weight", "byt5_in.fc1.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen25vl", "qwen_2.5_vl_7b_fp8_scaled.safetensors", ("text_encoders.qwen25_7b.transformer.",)
        ),
        "text_encoder_2": EncoderSlot(
            "byt5_small", "byt5_small_glyphxl_fp16.safetensors", ("text_encoders.byt5_small.transformer.",)
        ),
    }
    autoencoder = AutoencoderSlot(
        "hunyuan_video15",
        channels=32,
        usual_file="hunyuanvideo15_vae_fp16.safetensors",
        prefixes=("vae.",),
        latent=LatentFormat(32, 16, scale=1.03682, frames=True, time_downscale=4),
    )
    image_encoder = EncoderSlot("siglip_384", "sigclip_vision_patch14_384.safetensors")
    controls = (
        ControlForm(
            name="i2v",
            pipeline="HunyuanVideo15ImageToVideoPipeline",
            source="first frame",
            is_required=True,
            most=1,
            most_pixels=848 * 480,
        ),
    )
    clip_types = ("hunyuan_video_15",)
    routing = Routing(
        blocks={"transformer_blocks": {"hidden_states": "bp.", "attention_mask": "b..t", "freqs_cis": "p."}},
        patch=(1, 1, 1),
        states=0,
    )
    own_defaults = Defaults(
        resolution=640,  # the area of 480p
        learning_rate=1e-4,  # musubi-tuner's example
        targets="transformer",  # what musubi-tuner trains: all of the blocks
        guidance=6.0,  # the authors' table
        timestep_distribution="shifted",
        frames=33,  # of the 121 that it was trained on, whose activations take a data centre's memory
        frame_rate=24.0,
    )
    distilled = {"cfg_distilled": 20, "distilled": 8}  # steps of ComfyUI's templates
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(title, r"(^|_)double_blocks_\d+_(img|txt)_(attn_[qkv]$|mlp_fc[12]$|mod_linear$)"),
        # Flux.1 and HunyuanVideo 1.0 have blocks of these names that are 3072 wide.
        Signature(title, r"(^|_)double_blocks_\d+_(img|txt)_(attn_qkv|attn_proj|mlp_0|mod_lin)$", _WIDTH),
        Signature(
            title, r"(^|_)transformer_blocks_\d+_(attn_(to_[qkv]|add_[qkv]_proj)|ff_context_net_0_proj)$", _WIDTH
        ),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["img_in.proj.weight"][:2]
        outputs = shapes["final_layer.linear.weight"][0]
        variant = None
        if channels != 2 * outputs + 1:
            variant = f"an upsampler, which takes {channels} channels"
        elif any(name.startswith("time_r_in.") for name in shapes):
            variant = "distilled to few steps by MeanFlow"
        if variant is not None:
            raise ModelError(
                f"{self.title} must be a base model, but this one is {variant}; choose a file such as "
                "hunyuanvideo1.5_720p_t2v_fp16"
            )
        return {
            "in_channels": channels,
            "out_channels": outputs,
            "num_attention_heads": width // _HEAD,
            "attention_head_dim": _HEAD,
            "num_layers": block_count(shapes, "double_blocks."),
            "num_refiner_layers": block_count(shapes, "txt_in.individual_token_refiner.blocks."),
            "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
            "text_embed_2_dim": shapes["byt5_in.fc1.weight"][1],
            "image_embed_dim": shapes["vision_in.proj.0.weight"][0],
            "rope_axes_dim": rope_axes(_HEAD),
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            usual, *others = (OriginalName(name) for name in _TOP[path])
            return replace(usual, swap_halves=path == "norm_out.linear", others=tuple(others))
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        if path.startswith("transformer_blocks."):
            _, index, rest = path.split(".", 2)
            place = in_double_block(index, rest, width, _DOUBLE)
        else:
            index, rest = path.removeprefix("context_embedder.token_refiner.refiner_blocks.").split(".", 1)
            block = f"txt_in.individual_token_refiner.blocks.{index}"
            if rest in _REFINER:
                place = OriginalName(f"{block}.{_REFINER[rest]}")
            else:
                third = "qkv".index(rest.removeprefix("attn.to_"))
                place = OriginalName(f"{block}.self_attn.qkv", rows=(third * width, (third + 1) * width))
        end = next((author for author in _AUTHORS if place.path.endswith(author)), None)
        if end is None:
            return place
        name = place.path.removesuffix(end) + _AUTHORS[end]
        authors = [replace(place, path=name)]
        if place.rows is not None:
            authors.append(OriginalName(name.removesuffix("qkv") + "qkv"[place.rows[0] // width]))
        return replace(place, others=tuple(authors))

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        return _flow(_SHIFT)

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        return _flow(float(configs.of("scheduler").get("shift", _SHIFT)))

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        return self.autoencoder.latents(denoiser.config.out_channels)

    def encoder_slots(self, denoiser: nn.Module, form: ControlForm) -> Mapping[str, EncoderSlot]:
        return {**self.text_encoders, **({IMAGE_ENCODER: self.image_encoder} if form.most else {})}

    def encoder_width(self, denoiser: Any, component: str) -> int | None:
        config = denoiser.config
        widths = {"text_encoder": config.text_embed_dim, "text_encoder_2": config.text_embed_2_dim}
        return int(widths.get(component, config.image_embed_dim))

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        return {"context": (1, self.usual_tokens, denoiser.config.text_embed_dim)}

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text, follows_diffusers = texts["text_encoder"], encoding.follows_diffusers
        # Between the aspects HunyuanVideo15Pipeline has the indentation of its source.
        system = (f" {' ' * 8}" if follows_diffusers else "\n").join((_SYSTEM, *_ASPECTS))
        chat = f"{_TURN}system\n{system}<|im_end|>\n{_TURN}user\n{literal_text(text, encoding) or ' '}{ANSWER}"
        if follows_diffusers:
            ids = tokenizer(chat).input_ids[: _DROPPED + _TOKENS]
            start = _DROPPED
        else:
            ids = tokenizer(literal_text(text, encoding) if text.startswith(_TURN) else chat).input_ids
            start = seen_from(tokenizer, ids)
        tensors = {"context": hidden_states(encoder, ids, [_LAYER])[:, start:].flatten(2)}
        if glyphs := _glyphs(texts["text_encoder_2"], follows_diffusers=follows_diffusers):
            tensors["glyphs"] = encode_umt5(
                glyphs,
                encoders.tokenizers["text_encoder_2"],
                self.text_encoder(encoders, "text_encoder_2"),
                max_tokens=_GLYPHS if follows_diffusers else None,
            )
        return Conditioning(tensors, text)

    def picture_inputs(
        self, form: ControlForm, components: Components, encode: Encode, pixels: Tensor, mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        if pixels.ndim == 4 or pixels.shape[2] == 1:  # a picture has no frames to draw from its first
            return {}
        first = encode(pixels[:, :, :1])
        frames, height, width = pixels.shape[2:]
        channels, *places = components.latent.shape(height, width, frames)
        known = first.new_zeros(1, channels + 1, *places)
        known[:, :-1, :1], known[:, -1, 0] = first, 1.0
        if components.image_encoder is None:  # where shapes alone are asked for
            return {"known": known}
        # As ComfyUI's template crops it; the authors' program squashes it.
        return {"known": known, CLIP_VISION: picture_states(components.image_encoder, pixels[:, :, 0], crop=True)}

    def known_latents(self, denoiser: nn.Module, latents: Tensor, mask: Tensor) -> Tensor | None:
        return torch.cat((latents, 1 - mask.expand(len(latents), *(-1,) * 4)), dim=1)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        config: Any = denoiser.config
        channels = config.in_channels - latents.shape[1]
        known = tensors.get("known")
        if known is None:  # as in ComfyUI
            known = latents.new_zeros(len(latents), channels, *latents.shape[2:])
        elif known.shape[1:] != (channels, *latents.shape[2:]):
            raise DataError(
                f"known of a conditioning for {self.title} must be (batch, {channels}, "
                f"{', '.join(map(str, latents.shape[2:]))}), got {tuple(known.shape)}; encode the first frame at the "
                "size and length of the clip"
            )
        prediction: Tensor = denoiser(
            hidden_states=torch.cat((latents, known), dim=1),
            timestep=time.to(latents.device),
            encoder_hidden_states=tensors["context"],
            encoder_attention_mask=conditioning.mask,
            encoder_hidden_states_2=tensors.get("glyphs"),
            image_embeds=tensors.get(CLIP_VISION),
        )
        return prediction


def _glyphs(text: str, *, follows_diffusers: bool) -> str:
    """What a prompt has in quotation marks, as ByT5 reads it; empty if there is nothing.

    ComfyUI takes single quotation marks too, and repeats what is there twice.
    """
    if follows_diffusers:
        quoted = list(dict.fromkeys(_quoted(text, _QUOTES[0], _QUOTES[2])))
    else:
        quoted = [words for marks in _QUOTES for words in _quoted(text, marks)]
    return "".join(f'Text "{words}". ' for words in quoted)


def _quoted(text: str, *marks: tuple[str, str]) -> Iterator[str]:
    """What is between marks on a line, from left to right."""
    for line in text.split("\n"):
        closings, at = dict(marks), 0
        while ends := [place for opening in closings if (place := line.find(opening, at)) >= 0]:
            start = min(ends)
            end = line.find(closings[line[start]], start + 1)
            if end < 0:
                del closings[line[start]]
            else:
                yield line[start + 1 : end]
                at = end + 1


def _flow(shift: float) -> Diffusion:
    return Diffusion("flow", FlowSchedule(shift, resolution_shift=_RESOLUTION_SHIFT, time_scale=_TIMES))


register(HunyuanVideo15(), "hunyuanvideo1.5")
