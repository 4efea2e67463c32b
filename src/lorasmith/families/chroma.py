"""Chroma (Lodestone Rock 2025): Flux.1 schnell without CLIP, with one network for the modulation of all blocks.

The approximator (`distilled_guidance_layer`) makes the shifts, scales and gates of every block from time and the number
of the block. Text is T5's, with its padding hidden: ComfyUI gives the tokens of the prompt alone, diffusers one token
of padding more, as the model was trained. diffusers' pipeline has a mask of numbers, which attention adds instead of
hiding anything; here it is boolean.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import ModelError
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning, check_even
from lorasmith.families.files.original_weights import block_count, norm_name
from lorasmith.families.forms import Defaults, Diffusion, LatentFormat, Routing
from lorasmith.families.parts import flux_layout
from lorasmith.families.parts.autoencoders import FLUX_AUTOENCODER
from lorasmith.families.parts.flux_layout import (
    ATTENTION,
    FEED_FORWARD,
    IN_BLOCKS,
    image_positions,
    in_double_block,
    in_single_block,
    packed_latents,
    unpacked_latents,
)
from lorasmith.families.parts.language_models import T5XXL_SLOT, encode_t5
from lorasmith.families.slots import Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_TOKENS = 512  # ChromaPipeline's longest prompt
_APPROXIMATOR = "distilled_guidance_layer."

_TOP = {path: name for path, name in flux_layout.TOP.items() if path != "norm_out.linear"}
_DOUBLE = {**flux_layout.DOUBLE_ATTENTION, **flux_layout.DOUBLE_FEED_FORWARD}
_IN_LAYER = {"linear_1": "in_layer", "linear_2": "out_layer"}
_BLOCKS = r"(^|_)(double|single)_blocks_\d|(^|_)(single_)?transformer_blocks_\d"
_ROUTED = {"image_rotary_emb": "t.", "attention_mask": "bt"}


class Chroma(Family):
    """Chroma1: Base and HD."""

    name = "chroma"
    title = "Chroma"
    pipeline = "ChromaPipeline"
    network = "lorasmith.families.parts.masked_transformers.DeviceChroma"
    text_width = "joint_attention_dim"
    modelspec_implementation = "https://huggingface.co/lodestones/Chroma"
    kohya_name = "chroma"
    modelspec_name = "chroma"
    limits = ProgramLimits(
        unknown_to_comfyui=(f"{_APPROXIMATOR}*",),
        diffusers_applies={"kohya": IN_BLOCKS, "comfy": IN_BLOCKS},
        sd_scripts_applies=(*IN_BLOCKS, "x_embedder", "context_embedder"),
    )
    # ComfyUI's shift for KSampler, which has no other setting for it; its template sets none.
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(1.15))
    targets = {
        "attention": Rule(ATTENTION),
        "attention+ff": Rule((*ATTENTION, *FEED_FORWARD)),
        "transformer": Rule(("*transformer_blocks.*",), linear_only=True),
    }
    text_encoders = {"text_encoder": T5XXL_SLOT}
    autoencoder = FLUX_AUTOENCODER
    routing = Routing(
        blocks={
            "transformer_blocks": {"hidden_states": "bp.", **_ROUTED},
            "single_transformer_blocks": {"hidden_states": "bt.", **_ROUTED},
        },
        text="first",
    )
    clip_types = ("chroma",)
    own_defaults = Defaults(
        guidance=3.5,  # ComfyUI's template
        timestep_distribution="logit_normal",  # ai-toolkit's and sd-scripts' `sigmoid`
    )
    distilled = {"flash": 8}  # steps of ComfyUI's templates
    releases = (
        Release(
            name="chroma1-hd",
            title="Chroma1-HD",
            about="Photographs and drawings, with negative prompts; made from Flux.1 schnell by its community.",
            file="Chroma1-HD.safetensors",
            hub=HubFolder("lodestones/Chroma1-HD", 17.8),
            licence="Apache 2.0",
            card="lodestones/Chroma1-HD",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    # Its blocks have the names and widths of Flux.1's.
    lora_signatures = (
        Signature(title, r"(^|_)distilled_guidance_layer_"),
        Signature(title, _BLOCKS, architecture="chroma"),
    )

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        has_blocks = norm_name(flux_layout.KEY_NORM, shapes) in shapes and "img_in.weight" in shapes
        return has_blocks and any(name.startswith(_APPROXIMATOR) for name in shapes)

    def denoiser_class(self) -> type[nn.Module]:
        # The class itself takes one of diffusers' modules from a place that it has left.
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
        return super().denoiser_class()

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        config = flux_layout.block_config(shapes)
        if config["in_channels"] != 64:
            raise ModelError(
                f"this Chroma variant takes {config['in_channels']} input channels, but only text-to-image models with "
                "64 are supported"
            )
        hidden, approximated = shapes[f"{_APPROXIMATOR}in_proj.weight"]
        return {
            **config,
            "approximator_num_channels": approximated,
            "approximator_hidden_dim": hidden,
            "approximator_layers": block_count(shapes, f"{_APPROXIMATOR}layers."),
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path])
        if path.startswith(_APPROXIMATOR):
            stem, _, leaf = path.rpartition(".")
            return OriginalName(f"{stem}.{_IN_LAYER.get(leaf, leaf)}")
        kind, index, rest = path.split(".", 2)
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        if kind == "transformer_blocks":
            return in_double_block(index, rest, width, _DOUBLE)
        return in_single_block(index, rest, width, denoiser.get_submodule(path).weight.shape[0])

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        return self.autoencoder.latents(denoiser.config.in_channels // 4)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        if encoding.follows_diffusers:
            context = encode_t5(text, tokenizer, encoder, max_tokens=_TOKENS, min_padding=1, hides_padding=True)
            return Conditioning({"context": context[:, :_TOKENS]}, text)
        context = encode_t5(text, tokenizer, encoder, **encoding.tokens_of("t5xxl", 1), empty_ends=False)
        return Conditioning({"context": context}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        check_even(latents, self.title)
        height, width = latents.shape[-2:]
        context, mask = conditioning.tensors["context"], conditioning.mask
        if mask is not None:
            _let_padding_attend(denoiser)
            mask = torch.cat((mask, mask.new_ones(len(mask), height // 2 * (width // 2))), dim=1)
        prediction = denoiser(
            hidden_states=packed_latents(latents),
            encoder_hidden_states=context,
            timestep=time.to(latents.dtype),
            txt_ids=torch.zeros(context.shape[1], 3, device=latents.device),
            img_ids=image_positions(height // 2, width // 2, latents.device),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpacked_latents(prediction, height, width)


class _KeysHidden:
    """A processor of attention whose mask hides keys alone.

    diffusers' blocks forbid tokens of padding to attend to anything. Kernels differ in what they make of that, NaN
    included, and a mask for each pair of tokens takes memory.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask.any(dim=-2, keepdim=True)
        return self._processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _let_padding_attend(denoiser: nn.Module) -> None:
    """Change the denoiser's attention for good: its blocks may be computed again after the prediction."""
    for layer in denoiser.modules():
        processor = getattr(layer, "processor", None)
        if processor is not None and not isinstance(processor, _KeysHidden):
            layer.processor = _KeysHidden(processor)  # type: ignore[assignment]


register(Chroma(), "chroma1")
