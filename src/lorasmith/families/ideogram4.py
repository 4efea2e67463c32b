"""Ideogram 4 (Ideogram 2026): a rectified-flow transformer in one stream that reads thirteen layers of Qwen3-VL.

Text and latents of Flux.2's autoencoder run together through all blocks. The network counts time from noise to picture
and gives the negative of the velocity. It was trained on captions that are JSON. A second network of the same tensors,
which sees no text, guides it in the authors' pipeline and ComfyUI's template; LoRAs are trained on the first. The
original layout, which ComfyUI has too, fuses query, key and value; diffusers splits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, Routing
from lorasmith.families.parts.autoencoders import FLUX2_AUTOENCODER, PLACES_FIRST
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.language_models import ANSWER, hidden_states, last_norm_left_out
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import DENOISER_START, Signature

_LAYERS = (*range(1, 35, 3), 36)  # of the encoder's states
_WIDTH = 4608
_TURN = "<|im_start|>"
# The authors' noise levels are log-normal around the side of the picture over 512 px; a uniform time that is shifted by
# this number is as wide.
_SIDE_SHIFT = ResolutionShift(mu=(0.0, math.log(2)), patches=(32**2, 64**2), patch=1, is_power=True)

_REQUEST = (
    "Describe this picture as one JSON object in one line, without any other text: "
    '{"high_level_description": "what it shows and in which medium, in a sentence", "compositional_deconstruction": '
    '{"background": "surroundings, ground and light", "elements": [{"type": "obj", "desc": "a thing or person, with '
    'its colours, shape and place"}, {"type": "text", "text": "letters as they are written", "desc": "how they '
    'look and where they are"}]}}. One element for each thing and each piece of lettering that is seen, the main one '
    "first; no text elements without lettering."
)

_ATTENTION = ("layers.*.attention.to_*",)
_FUSED = ("to_q", "to_k", "to_v")


class Ideogram4(Family):
    """Ideogram 4."""

    name = "ideogram4"
    title = "Ideogram 4"
    pipeline = "Ideogram4Pipeline"
    network = "lorasmith.families.parts.ideogram4_network.Ideogram4Transformer"
    text_width = "llm_features_dim"
    usual_tokens = 256  # captions are long
    caption_request = _REQUEST
    caption_keys = ("high_level_description", "compositional_deconstruction")
    diffusers_start = "layers.0.attention.to_q."
    modelspec_implementation = "https://github.com/ideogram-oss/ideogram4"
    kohya_name = "ideogram4"
    modelspec_name = "ideogram-4"
    portable = "ai-toolkit"
    limits = ProgramLimits(
        diffusers_applies={"ai-toolkit": ("layers.*",)},
        diffusers_refuses_others=True,
        diffusers_refuses_unknown=True,
        sd_scripts_applies=None,
    )
    own_diffusion = Diffusion("flow", FlowSchedule(resolution_shift=_SIDE_SHIFT))  # ComfyUI's for KSampler
    targets = {
        "attention": Rule(_ATTENTION),
        "attention+ff": Rule((*_ATTENTION, "layers.*.feed_forward.w*")),
        "transformer": Rule(("layers.*",), linear_only=True),
    }
    signs = ("embed_image_indicator.weight", "llm_cond_proj.weight", "layers.0.attention.qkv.weight")
    text_encoders = {
        "text_encoder": EncoderSlot(
            "qwen3vl",
            "qwen3vl_8b_fp8_scaled.safetensors",
            ("text_encoders.qwen3vl_8b.transformer.",),
            widths=(4096,),
            hub=HubFolder("Comfy-Org/Qwen3-VL/text_encoders", 10.6),
        )
    }
    autoencoder = replace(FLUX2_AUTOENCODER, in_pipelines={PLACES_FIRST: True})
    clip_types = ("ideogram4",)
    routing = Routing(
        blocks={"layers": {"hidden_states": "bt.", "attention_mask": "b..t", "image_rotary_emb": "bt.."}},
        text="first",
        patch=(1, 1, 1),
    )
    own_defaults = Defaults(
        # diffusers' trainer has the layers of attention and feed-forward, too
        guidance=7.0,  # the pipeline's and ComfyUI's template
        timestep_distribution="shifted",
    )
    releases = (
        Release(
            name="ideogram-4",
            title="Ideogram 4",
            about="Lettering, posters and layouts, from captions in JSON; not for commercial use.",
            file="ideogram4_fp8_scaled.safetensors",
            hub=HubFolder("Comfy-Org/Ideogram-4/diffusion_models", 9.28),
            licence="Ideogram 4 Non-Commercial License",
            card="ideogram-ai/ideogram-4-fp8",
        ),
    )
    released: Mapping[str, Any] = {}  # the class' own defaults
    lora_signatures = (
        Signature(title, DENOISER_START + r"(layers_\d+_(attention_o$|adaln_modulation$)|llm_cond_proj$)", order=4),
        Signature(title, DENOISER_START + r"layers_\d+_(attention|feed_forward)_", _WIDTH, order=5),
    )

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        head = shapes["layers.0.attention.norm_q.weight"][0]
        width, channels = shapes["input_proj.weight"]
        return {
            "in_channels": channels,
            "num_layers": block_count(shapes, "layers."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
            "adaln_dim": shapes["adaln_proj.weight"][0],
            "llm_features_dim": shapes["llm_cond_proj.weight"][1],
            # 24, 20, 20 for the released head width of 256, in the same proportion for others
            "mrope_section": tuple(part * head // 256 for part in (24, 20, 20)),
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        block, _, rest = path.partition(".attention.")
        if rest in _FUSED:
            width = denoiser.config.attention_head_dim * denoiser.config.num_attention_heads
            start = _FUSED.index(rest) * width
            return OriginalName(f"{block}.attention.qkv", rows=(start, start + width))
        return OriginalName(f"{block}.attention.o" if rest == "to_out.0" else path)

    def encoder_width(self, denoiser: Any, component: str) -> int:
        return int(denoiser.config.llm_features_dim) // len(_LAYERS)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, text = self.text_encoder(encoders, "text_encoder"), texts["text_encoder"]
        prompt = literal_text(text, encoding)
        is_chat = prompt.startswith(_TURN) and not encoding.follows_diffusers
        ids = encoders.tokenizers["text_encoder"](prompt if is_chat else f"{_TURN}user\n{prompt}{ANSWER}").input_ids
        with last_norm_left_out(encoder):
            states = hidden_states(encoder, ids, _LAYERS)
        return Conditioning({"context": states.transpose(2, 3).flatten(2)}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = denoiser(
            latents, timestep=1 - time, text=conditioning.tensors["context"], mask=conditioning.mask
        )
        return -velocity


register(Ideogram4(), "ideogram-4")
