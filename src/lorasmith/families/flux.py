"""Flux.1 (Black Forest Labs 2024): a rectified-flow transformer over packed latents, here its denoiser.

Latents of 16 channels are packed 2×2 into tokens of 64; text is a T5 sequence and a pooled CLIP vector; distilled
guidance is an input. Fill's tokens of 384 have the latents of the picture without what is to be painted, and the mask
of that, beside the noisy latents. The original layout fuses query, key, value (and, in single blocks, the MLP's first
matrix) into one tensor; diffusers splits them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule, forward_replaced
from lorasmith.core.errors import ModelError
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import BY_INDEX, BY_OFFSET, BY_UXO, Conditioning, check_even
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import norm_name
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, Encode, LatentFormat, Routing
from lorasmith.families.parts import flux_layout
from lorasmith.families.parts.autoencoders import FLUX_AUTOENCODER
from lorasmith.families.parts.clip import CLIP_L_SLOT, encode_prompt, released_paths, trained_paths
from lorasmith.families.parts.flux_layout import (
    ATTENTION,
    FEED_FORWARD,
    IN_BLOCKS,
    attention_arguments,
    control_corners,
    image_positions,
    in_double_block,
    in_single_block,
    packed_latents,
    unpacked_latents,
)
from lorasmith.families.parts.language_models import RELEASED_PATHS, T5XXL_SLOT, encode_t5
from lorasmith.families.slots import Components, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import EncoderNames, OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_MODULATION = ("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear")
_CHANNELS, _FILL_CHANNELS = 64, 384  # of a token; Fill has 64 of the given picture and 256 of the mask, too
_DEFAULT_GUIDANCE, _FILL_GUIDANCE = 3.5, 30.0
_DOWNSCALE = FLUX_AUTOENCODER.downscale
_MU = 1.15  # ComfyUI's shift for KSampler, and that of the resolution 1024×1024

_TOP = {
    **flux_layout.TOP,
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}
_DOUBLE = {
    **flux_layout.DOUBLE_ATTENTION,
    **flux_layout.DOUBLE_FEED_FORWARD,
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_ROUTED = {"hidden_states": "bp.", "image_rotary_emb": "t.", "joint_attention_kwargs": "b..t"}
# XLabs' trainer puts LoRAs into attention processors; stream 1 of a double block is the picture's, 2 the text's.
_IMAGE, _TEXT = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_XLABS = {
    "transformer_blocks": {
        **dict.fromkeys(_IMAGE, "qkv_lora1"),
        **dict.fromkeys(_TEXT, "qkv_lora2"),
        "attn.to_out.0": "proj_lora1",
        "attn.to_add_out": "proj_lora2",
    },
    "single_transformer_blocks": {**dict.fromkeys(_IMAGE, "qkv_lora"), "proj_out": "proj_lora"},
}


_WIDE = ((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880), (1104, 944))
KONTEXT_SIZES = (*(size[::-1] for size in _WIDE), (1024, 1024), *reversed(_WIDE))
"""(width, height) of the pictures that Kontext was trained on."""

# Not among the family's `controls`, of which names or `edit` choose one: its tensors tell it.
_FILL = ControlForm(source="mask", pipeline="FluxFillPipeline", is_required=True, most=1)


class Flux(Family):
    """Flux.1 dev, schnell, Kontext, whose control is a picture to edit, and Fill, which paints what a mask covers."""

    name = "flux1"
    title = "Flux.1"
    pipeline = "FluxPipeline"
    network = "FluxTransformer2DModel"
    modelspec_implementation = "https://github.com/black-forest-labs/flux"
    kohya_name = "flux1"
    modelspec_name = "flux-1-dev"
    limits = ProgramLimits(
        diffusers_applies={"kohya": IN_BLOCKS, "comfy": IN_BLOCKS},
        sd_scripts_applies=(*IN_BLOCKS, "x_embedder", "context_embedder", "time_text_embed.*"),
    )
    civitai_name = "Flux.1 D"
    a1111_version = "Flux"
    targets = {
        "attention": Rule(ATTENTION),
        "attention+ff": Rule((*ATTENTION, *FEED_FORWARD)),
        "transformer": Rule((*ATTENTION, *FEED_FORWARD, *_MODULATION)),
    }
    text_encoders = {"text_encoder": CLIP_L_SLOT, "text_encoder_2": T5XXL_SLOT}
    clip_types = ("flux",)
    own_defaults = Defaults(
        guidance=1.0  # Flux.1 is distilled: its guidance is an input, not a second pass
    )
    distilled = {"schnell": 4}  # steps of ComfyUI's templates
    training_adapters = {"schnell": "ostris/FLUX.1-schnell-training-adapter/pytorch_lora_weights.safetensors"}
    controls = (
        ControlForm(
            name="kontext", pipeline="FluxKontextPipeline", is_required=True, is_aligned=True, sizes=KONTEXT_SIZES
        ),
    )
    control_methods = (BY_OFFSET, BY_INDEX, BY_UXO)
    autoencoder = FLUX_AUTOENCODER
    routing = Routing(blocks={"transformer_blocks": _ROUTED, "single_transformer_blocks": _ROUTED}, text="first")
    releases = (
        Release(
            name="flux.1-dev",
            title="Flux.1 dev",
            about="Photographs and long prompts; many LoRAs are for it.",
            file="flux1-dev.safetensors",
            hub=HubFolder("black-forest-labs/FLUX.1-dev", 23.8),
            licence="FLUX.1 [dev] Non-Commercial License",
            card="black-forest-labs/FLUX.1-dev",
            is_gated=True,
        ),
    )
    released = {"guidance_embeds": True}
    lora_signatures = (
        Signature(title, r"(^|_)(double|single)_blocks_\d|single_transformer_blocks_\d", order=1),
        Signature(title, r"(^|_)transformer_blocks_\d+_(ff_context|attn_add_q_proj)", 3072, order=4),
        Signature(title, r"^text_encoder_2_encoder_block_", order=7),
    )

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if norm_name(flux_layout.KEY_NORM, shapes) not in shapes or "img_in.weight" not in shapes:
            return False
        # Flux.2 shares its modulation between blocks; Chroma replaces it by an approximator.
        return not any(name.startswith(("double_stream_modulation_img", "distilled_guidance_layer")) for name in shapes)

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        return super().recognises_pipeline(configs) or _FILL.pipeline in configs.classes

    def controls_of(self, denoiser: Any, names: Sequence[str], edit: str | None = None) -> ControlForm | None:
        return _FILL if _is_fill(denoiser) else super().controls_of(denoiser, names, edit)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        config = flux_layout.block_config(shapes)
        if config["in_channels"] not in (_CHANNELS, _FILL_CHANNELS):
            raise ModelError(
                f"this Flux.1 variant takes {config['in_channels']} input channels (depth and canny do), but only "
                f"models with {_CHANNELS} (dev, schnell, Kontext) and {_FILL_CHANNELS} (Fill) are supported"
            )
        pooled = shapes["vector_in.in_layer.weight"][1]
        return {
            **config,
            "out_channels": _CHANNELS,
            "pooled_projection_dim": pooled,
            "guidance_embeds": flux_layout.GUIDANCE in shapes,
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path], swap_halves=path == "norm_out.linear")
        kind, index, rest = path.split(".", 2)
        hidden = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        if kind == "transformer_blocks":
            place = in_double_block(index, rest, hidden, _DOUBLE)
        elif rest == "norm.linear":
            place = OriginalName(f"single_blocks.{index}.modulation.lin")
        else:
            place = in_single_block(index, rest, hidden, denoiser.get_submodule(path).weight.shape[0])
        if (name := _XLABS[kind].get(rest)) is None:
            return place
        blocks = place.path.partition(".")[0]
        return replace(place, others=(OriginalName(f"{blocks}.{index}.processor.{name}", rows=place.rows),))

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        return _diffusion(has_guidance=flux_layout.GUIDANCE in checkpoint.denoiser_shapes)

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        return _diffusion(has_guidance=bool(configs.of(self.denoiser_folder).get("guidance_embeds", False)))

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        return self.autoencoder.latents((denoiser.config.out_channels or denoiser.config.in_channels) // 4)

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        return {
            "text_encoder": EncoderNames(
                released_paths(layers=12),
                kohya=("lora_te1_", "lora_te_"),
                comfyui=("clip_l", "clip_h"),
                drops_text_model=True,
            ),
            # kohya gives T5 the number it has in Stable Diffusion 3; OneTrainer counts a model's encoders.
            "text_encoder_2": EncoderNames(RELEASED_PATHS, kohya=("lora_te3_", "lora_te2_"), comfyui=("t5xxl",)),
        }

    def encoder_width(self, denoiser: Any, component: str) -> int | None:
        config = denoiser.config
        return int(config.pooled_projection_dim if component == "text_encoder" else config.joint_attention_dim)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        pooled = self._pooled(encoders, texts)
        return Conditioning(
            {"context": self._context(encoders, texts, encoding), "pooled": pooled}, texts["text_encoder_2"]
        )

    def _pooled(self, encoders: TextEncoders, texts: Mapping[str, str]) -> Tensor:
        clip, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        return encode_prompt(texts["text_encoder"], tokenizer, clip)[1]

    def _context(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Tensor:
        t5, tokenizer = self.text_encoder(encoders, "text_encoder_2"), encoders.tokenizers["text_encoder_2"]
        tokens = encoding.tokens_of("t5xxl", 512 if encoding.follows_diffusers else 256, 512)
        return encode_t5(texts["text_encoder_2"], tokenizer, t5, **tokens)

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        return {name: trained_paths(encoder) for name, encoder in text_encoders.items() if name == "text_encoder"}

    def encode_again(
        self,
        conditioning: Conditioning,
        encoders: TextEncoders,
        texts: Mapping[str, str],
        encoding: Encoding,
        components: Collection[str],
    ) -> Conditioning:
        tensors = {**conditioning.tensors, "pooled": self._pooled(encoders, texts)}
        if "text_encoder_2" not in components:
            return replace(conditioning, tensors=tensors)
        return replace(
            conditioning, tensors={**tensors, "context": self._context(encoders, texts, encoding)}, mask=None
        )

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        config = denoiser.config
        return {"context": (1, 512, config.joint_attention_dim), "pooled": (1, config.pooled_projection_dim)}

    def picture_inputs(
        self, form: ControlForm, components: Components, encode: Encode, pixels: Tensor, mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        whole = pixels.new_ones(1, 1, *pixels.shape[-2:])
        inside = whole if mask is None else mask.round().expand_as(whole)
        inside = torch.where(inside.any(), inside, whole)  # a mask of nothing is none; no branch, for meta tensors
        return {"known": _known(encode(pixels * (1 - inside)), inside)}

    def known_latents(self, denoiser: Any, latents: Tensor, mask: Tensor) -> Tensor | None:
        return _known(latents, mask) if _is_fill(denoiser) else None

    def predict(self, denoiser: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = latents.shape[-2:]
        context = conditioning.tensors["context"]
        guidance = None
        if denoiser.config.guidance_embeds:  # schnell has no such input
            of_conditioning = conditioning.tensors.get("guidance")
            default = _FILL_GUIDANCE if _is_fill(denoiser) else _DEFAULT_GUIDANCE
            guidance = latents.new_full((len(latents),), default) if of_conditioning is None else of_conditioning
        tokens, positions = [], []
        corners = control_corners(conditioning, (height, width), by_index=False, patch=2)
        if _is_fill(denoiser):
            known = conditioning.tensors.get("known")
            latents = torch.cat((latents, self._nothing_known(latents) if known is None else known), dim=1)
        for picture, corner in zip((latents, *conditioning.controls), ((0, 0, 0), *corners), strict=True):
            check_even(picture, self.title)
            rows, columns = (side // 2 for side in picture.shape[-2:])
            tokens.append(packed_latents(picture))
            positions.append(image_positions(rows, columns, latents.device, corner))
        left_out = denoiser.config.guidance_embeds and "no_guidance" in conditioning.tensors
        embeddings: Any = denoiser.time_text_embed
        with outputs_zeroed(embeddings.guidance_embedder) if left_out else contextlib.nullcontext():
            prediction = denoiser(
                hidden_states=torch.cat(tokens, dim=1),
                timestep=time.to(latents.dtype),
                guidance=guidance,
                pooled_projections=conditioning.tensors["pooled"],
                encoder_hidden_states=context,
                txt_ids=torch.zeros(context.shape[1], 3, device=latents.device),
                img_ids=torch.cat(positions),
                joint_attention_kwargs=attention_arguments(conditioning.mask, sum(map(len, positions))),
                return_dict=False,
            )[0]
        return unpacked_latents(prediction[:, : height // 2 * (width // 2)], height, width)

    def unread_left_out(self, denoiser: Any) -> contextlib.AbstractContextManager[None]:
        """The network drops the text's tokens behind its last block, which needs no feed-forward product of them.

        Of 57 blocks at 512 pixels, where a third of the tokens are text, that is about 0.4 % of a step; with smaller
        pictures, or in shallower models, it is more. What is read is the same, up to the order of sums.
        """
        blocks = denoiser.single_transformer_blocks
        return forward_replaced(blocks[-1], types.MethodType(_of_the_picture, blocks[-1]))

    def _nothing_known(self, latents: Tensor) -> Tensor:
        """What Fill is given in ComfyUI where a conditioning has nothing for it: latents of 0, all to be painted."""
        nothing = self.autoencoder.latents(latents.shape[1]).to_model(torch.zeros_like(latents))
        return _known(nothing, nothing.new_ones(1, 1, *(_DOWNSCALE * side for side in latents.shape[-2:])))


def _known(latents: Tensor, mask: Tensor) -> Tensor:
    """(batch, 16 + 64, height, width): latents, and the pixels of the mask (batch or 1, 1, ...) at each of them."""
    pixels = F.pixel_unshuffle(mask, _DOWNSCALE)
    return torch.cat((latents, pixels.to(latents).expand(len(latents), -1, -1, -1)), dim=1)


def _is_fill(denoiser: Any) -> bool:
    return bool(denoiser.config.in_channels == _FILL_CHANNELS)


def _of_the_picture(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of a single block, whose tokens of text come back as they were."""
    text = encoder_hidden_states.shape[1]
    both, gate = block.norm(torch.cat((encoder_hidden_states, hidden_states), dim=1), emb=temb)
    mixed = block.attn(hidden_states=both, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    own = torch.cat((mixed[:, text:], block.act_mlp(block.proj_mlp(both[:, text:]))), dim=2)
    states = hidden_states + gate.unsqueeze(1) * block.proj_out(own)
    return encoder_hidden_states, states.clip(-65504, 65504) if states.dtype == torch.float16 else states


@contextlib.contextmanager
def outputs_zeroed(module: nn.Module) -> Iterator[None]:
    """Inside the context the module's output is zeros, so that a sum is without it."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def _diffusion(*, has_guidance: bool) -> Diffusion:
    """Of dev, or of schnell, which is distilled to few steps without a shift."""
    if has_guidance:
        return Diffusion("flow", FlowSchedule.exponential(_MU))
    return Diffusion("flow", FlowSchedule())


register(Flux(), "flux")
