"""Flux.2 (Black Forest Labs 2025): dev, with distilled guidance, and the smaller klein models.

A rectified-flow transformer like Flux.1, without a pooled vector and with one modulation for all blocks of a kind.
Its autoencoder gives latents of 128 channels, 16 pixels each, which are tokens as they are. Text is three layers of a
language model side by side: Mistral's for dev, Qwen3's for klein, whose base and distilled variants have the same
tensors. All of them take controls, which are pictures to edit or refer to. The original layout fuses query, key and
value of double blocks; diffusers splits them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.diffusion.schedule import FlowSchedule, ResolutionShift
from lorasmith.families.base import Family, register
from lorasmith.families.conditionings import BY_INDEX, BY_OFFSET, BY_UXO, Conditioning
from lorasmith.families.forms import ControlForm, Defaults, Diffusion, LatentFormat, Routing
from lorasmith.families.parts import flux_layout
from lorasmith.families.parts.autoencoders import FLUX2_AUTOENCODER
from lorasmith.families.parts.encoders import literal_text
from lorasmith.families.parts.flux_layout import attention_arguments, control_corners, in_double_block
from lorasmith.families.parts.language_models import hidden_states
from lorasmith.families.slots import EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import OriginalName, ProgramLimits
from lorasmith.formats.spelling import Signature

_TOKENS = 512  # of text, which is filled with padding that the transformer sees
_SPACING = 10  # of the indices of controls
_DEFAULT_GUIDANCE = 4.0  # of dev, in ComfyUI's template and in Flux2Pipeline
# ComfyUI's `supported_models.Flux2` has this exponential shift for KSampler; Flux2Scheduler computes its own.
_MU = 2.02
_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)

_ATTENTION = ("transformer_blocks.*.attn.to_*", "transformer_blocks.*.attn.add_*_proj")
_SINGLE = ("single_transformer_blocks.*.attn.to_*",)
_MLP = ("transformer_blocks.*.ff.linear_*", "transformer_blocks.*.ff_context.linear_*")
_ROUTED = {"image_rotary_emb": "t.", "joint_attention_kwargs": "b..t"}

_READ_BY_KOHYA_NAMES = (
    *("transformer_blocks.*", "single_transformer_blocks.*", "x_embedder", "context_embedder", "proj_out"),
    "time_guidance_embed.timestep_embedder.*",
)

_TOP = {
    **flux_layout.TOP,
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
_DOUBLE_PARTS = {
    **flux_layout.DOUBLE_ATTENTION,
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE_PARTS = {**flux_layout.SINGLE_NORMS, "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


_KLEIN_4B = Release(
    name="flux.2-klein-4b",
    title="Flux.2 klein base 4B",
    about="Photographs, lettering, and pictures to edit or refer to; small for its generation.",
    file="flux-2-klein-base-4b.safetensors",
    hub=HubFolder("Comfy-Org/Flux-2-Klein-4B/split_files/diffusion_models", 7.75),
    licence="Apache 2.0",
    card="black-forest-labs/FLUX.2-klein-base-4B",
    distilled="black-forest-labs/FLUX.2-klein-4B",
    config={"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
)


class Flux2(Family):
    """Flux.2 dev or klein."""

    network = "Flux2Transformer2DModel"
    text_width = "joint_attention_dim"
    usual_tokens = _TOKENS
    modelspec_implementation = "https://github.com/black-forest-labs/flux2"
    kohya_name = "flux2"
    limits = ProgramLimits(
        unknown_to_comfyui=("time_guidance_embed.*", "*_stream_modulation*"),
        # ai-toolkit's name of norm_out is read as well, but without exchanging the halves of its rows.
        diffusers_applies={
            "kohya": _READ_BY_KOHYA_NAMES,
            "ai-toolkit": (*_READ_BY_KOHYA_NAMES, "time_guidance_embed.*", "*_stream_modulation*"),
        },
        sd_scripts_applies=None,
    )
    # Its shift by size is musubi-tuner's `flux2_shift`.
    own_diffusion = Diffusion("flow", FlowSchedule.exponential(_MU, resolution_shift=ResolutionShift(patch=1)))
    targets = {
        "attention": Rule((*_ATTENTION, *_SINGLE)),
        "attention+ff": Rule((*_ATTENTION, *_SINGLE, *_MLP)),
        "transformer": Rule(("*transformer_blocks.*",), linear_only=True),
    }
    autoencoder = FLUX2_AUTOENCODER
    routing = Routing(
        blocks={
            "transformer_blocks": {"hidden_states": "bp.", **_ROUTED},
            "single_transformer_blocks": {"hidden_states": "bt.", **_ROUTED},
        },
        text="first",
        patch=(1, 1, 1),
    )
    clip_types = ("flux2",)
    controls = (ControlForm(),)
    control_methods = (BY_OFFSET, BY_INDEX, BY_UXO)

    def __init__(self, *, is_klein: bool) -> None:
        self.name = "flux2-klein" if is_klein else "flux2"
        self.title = "Flux.2 klein" if is_klein else "Flux.2"
        self.modelspec_name = "flux-2-klein" if is_klein else "flux-2-dev"
        self.civitai_name = None if is_klein else "Flux.2 D"  # 4B and 9B are two there
        self.pipeline = "Flux2KleinPipeline" if is_klein else "Flux2Pipeline"
        self.distilled = dict.fromkeys(("klein-4b", "klein-9b", "klein_4b", "klein_9b"), 4) if is_klein else {}
        self._is_klein = is_klein
        self._layers = (9, 18, 27) if is_klein else (10, 20, 30)
        kind, usual_file = (
            ("qwen3", "qwen_3_4b.safetensors for 4B, qwen_3_8b_fp8mixed.safetensors for 9B")
            if is_klein
            else ("mistral", "mistral_3_small_flux2_bf16.safetensors")
        )
        prefixes = tuple(
            f"text_encoders.{encoder}.transformer." for encoder in ("qwen3_4b", "qwen3_8b", "mistral3_24b")
        )
        widths = (2560, 4096) if is_klein else ()
        slot = EncoderSlot(kind, usual_file, prefixes, widths=widths)
        self.text_encoders = {"text_encoder": slot}
        if is_klein:
            folder = HubFolder("Comfy-Org/Flux-2-Klein-4B/split_files/text_encoders", 8.04)
            small = replace(slot, usual_file="qwen_3_4b.safetensors", hub=folder)
            self.releases = (replace(_KLEIN_4B, encoders={"text_encoder": small}),)
        blocks, width, text_width = ((8, 24), 4096, 12288) if is_klein else ((8, 48), 6144, 15360)
        self.released = {
            "num_layers": blocks[0],
            "num_single_layers": blocks[1],
            "num_attention_heads": width // 128,
            "joint_attention_dim": text_width,
            "guidance_embeds": not is_klein,
        }
        # Flux.1 has blocks of these names and the width of klein 4B, but other inner widths.
        blocks_named = r"(^|_)(double|single)_blocks_\d|single_transformer_blocks_\d"
        own = r"double_stream_modulation|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj"
        gated = r"(^|_)double_blocks_\d+_(img|txt)_mlp_2|transformer_blocks_\d+_ff(_context)?_linear_out"
        self.lora_signatures = (
            (
                *(Signature(self.title, own, width) for width in (3072, 4096)),
                Signature(self.title, gated, 3 * 3072),
                Signature(self.title, blocks_named, 4096, order=1),
            )
            if is_klein
            else (Signature(self.title, own), Signature(self.title, blocks_named, 6144, order=1))
        )

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        is_klein = flux_layout.GUIDANCE not in shapes
        return "double_stream_modulation_img.lin.weight" in shapes and self._is_klein == is_klein

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        config = flux_layout.block_config(shapes)
        return {
            **config,
            "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] / shapes["img_in.weight"][0],
            "guidance_embeds": not self._is_klein,
            "axes_dims_rope": (config["attention_head_dim"] // 4,) * 4,
        }

    def original(self, path: str, denoiser: Any) -> OriginalName:
        if path in _TOP:
            return OriginalName(_TOP[path], swap_halves=path == "norm_out.linear")
        kind, index, rest = path.split(".", 2)
        if kind == "single_transformer_blocks":
            return OriginalName(f"single_blocks.{index}.{_SINGLE_PARTS[rest]}")
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        return in_double_block(index, rest, width, _DOUBLE_PARTS)

    def defaults(self, denoiser: nn.Module, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        return Defaults(
            guidance=5.0 if self._is_klein else 1.0,  # klein base in ComfyUI's template; dev has an input for it
            timestep_distribution="logit_normal",  # OneTrainer's preset
        )

    def encoder_width(self, denoiser: Any, component: str) -> int | None:
        return int(denoiser.config.joint_attention_dim) // len(self._layers)

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, tokenizer = self.text_encoder(encoders, "text_encoder"), encoders.tokenizers["text_encoder"]
        text = texts["text_encoder"]
        ids = self._tokens(tokenizer, literal_text(text, encoding))
        if encoding.follows_diffusers:
            ids = ids[:_TOKENS]
        missing = max(0, _TOKENS - len(ids))
        if self._is_klein:  # padding after the text is encoded as well, though no word attends to it
            padded = [*ids, *[tokenizer.pad_token_id] * missing]
            states = hidden_states(encoder, padded, self._layers, mask=[True] * len(ids) + [False] * missing)
            return Conditioning({"context": states.flatten(2)}, text)
        if encoding.follows_diffusers:
            padded = [*[tokenizer.pad_token_id] * missing, *ids]
            states = hidden_states(encoder, padded, self._layers, mask=[False] * missing + [True] * len(ids))
            return Conditioning({"context": states.flatten(2)}, text)
        states = hidden_states(encoder, ids, self._layers).flatten(2)
        return Conditioning({"context": F.pad(states, (0, 0, missing, 0))}, text)

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = latents.shape[-2:]
        context = conditioning.tensors["context"]
        guidance = None
        if not self._is_klein and "no_guidance" not in conditioning.tensors:
            of_conditioning = conditioning.tensors.get("guidance")
            guidance = (
                latents.new_full((len(latents),), _DEFAULT_GUIDANCE) if of_conditioning is None else of_conditioning
            )
        pictures = (latents, *conditioning.controls)
        corners = ((0, 0, 0), *control_corners(conditioning, (height, width), by_index=True, spacing=_SPACING))
        positions = torch.cat(
            [
                _positions(index, (top, top + picture.shape[-2]), (left, left + picture.shape[-1]), 1, latents.device)
                for picture, (index, top, left) in zip(pictures, corners, strict=True)
            ]
        )
        prediction = denoiser(
            hidden_states=torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1),
            timestep=time.to(latents.dtype),
            guidance=guidance,
            encoder_hidden_states=context,
            txt_ids=_positions(0, (0, 1), (0, 1), context.shape[1], latents.device),
            img_ids=positions,
            joint_attention_kwargs=attention_arguments(conditioning.mask, len(positions)),
            return_dict=False,
        )[0][:, : height * width]
        return prediction.transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-any-return]

    def _tokens(self, tokenizer: Any, text: str) -> Sequence[int]:
        if self._is_klein:
            chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            return tokenizer(chat).input_ids  # type: ignore[no-any-return]
        chat = f"[SYSTEM_PROMPT]{_SYSTEM}[/SYSTEM_PROMPT][INST]{text}[/INST]"
        return [tokenizer.bos_token_id, *tokenizer(chat, add_special_tokens=False).input_ids]


def _positions(
    index: int, rows: tuple[int, int], columns: tuple[int, int], tokens: int, device: torch.device
) -> Tensor:
    """(rows · columns · tokens, 4) rotary positions (index, y, x, number of the token), ends excluded."""
    ranges = ((index, index + 1), rows, columns, (0, tokens))
    return torch.cartesian_prod(*(torch.arange(*span, device=device) for span in ranges))


register(Flux2(is_klein=False), "flux2-dev")
register(Flux2(is_klein=True), "klein")
