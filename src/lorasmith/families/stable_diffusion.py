"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752): a UNet, a CLIP text encoder, a KL autoencoder.

Both versions share everything but the text encoder (OpenAI CLIP-L, OpenCLIP-H without its last layer), the width of the
attention heads and, for the 768-pixel 2.x models, the parameterization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorasmith.families.base import register
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.forms import Diffusion
from lorasmith.families.parts import unet_layout
from lorasmith.families.parts.clip import encode_prompt, released_paths, trained_paths, written_paths
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import EncoderNames
from lorasmith.formats.spelling import SIGNATURES, Signature

_CONTEXT_WIDTH = {1: 768, 2: 1024}
_ENCODER = {
    1: EncoderSlot("clip_l", "clip_l.safetensors", ("cond_stage_model.transformer.",)),
    2: EncoderSlot("clip_h", "clip_h.safetensors", ("cond_stage_model.model.",)),
}
# Layers of the released encoders that are used.
_ENCODER_LAYERS = {1: 12, 2: 23}
# Configuration of the released UNets; the rest is diffusers' default.
_RELEASED = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
_RELEASED_OF = {
    1: {**_RELEASED, "cross_attention_dim": 768},
    2: {**_RELEASED, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


_RELEASES = (
    Release(
        name="sd1.5",
        title="Stable Diffusion 1.5",
        about="Small pictures by short prompts; trains on almost any card, and on a processor if it must.",
        file="v1-5-pruned-emaonly-fp16.safetensors",
        hub=HubFolder("Comfy-Org/stable-diffusion-v1-5-archive", 2.13),
        licence="CreativeML Open RAIL-M",
        card="stable-diffusion-v1-5/stable-diffusion-v1-5",
        holds=("text_encoder", "vae"),
    ),
)


class StableDiffusion(unet_layout.UNetFamily):
    """One version of Stable Diffusion before XL."""

    pipeline = "StableDiffusionPipeline"
    modelspec_implementation = "diffusers"
    kohya_naming = "diffusers"
    autoencoder = AutoencoderSlot(
        "kl", channels=4, usual_file="vae-ft-mse-840000-ema-pruned.safetensors", settings={"scaling_factor": 0.18215}
    )
    clip_types = ("stable_diffusion",)
    guidance = 7.5

    def __init__(self, version: int) -> None:
        self._version = version
        self.name = f"sd{version}"
        self.title = f"Stable Diffusion {version}.x"
        self.civitai_name = {1: "SD 1.5", 2: "SD 2.1"}[version]
        self.a1111_version = f"SD{version}"
        self.text_encoders = {"text_encoder": _ENCODER[version]}
        self.released = _RELEASED_OF[version]
        self.releases = _RELEASES if version == 1 else ()
        self.lora_signatures = (Signature(self.title, unet_layout.CROSS_ATTENTION, _CONTEXT_WIDTH[version], order=6),)

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        contexts = unet_layout.context_widths(shapes)
        # Small models of this architecture have narrower contexts than any release; they count as version 1. Those that
        # are conditioned on more than text and time are of other families, such as Stable Diffusion XL.
        is_small = len(contexts) == 1 and max(contexts) < 768 and "label_emb.0.0.weight" not in shapes
        return contexts == {_CONTEXT_WIDTH[self._version]} or (is_small and self._version == 1)

    def recognises_pipeline(self, configs: PipelineConfigs) -> bool:
        if not super().recognises_pipeline(configs):
            return False
        return bool(configs.of("unet").get("cross_attention_dim") == 1024) == (self._version == 2)

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return unet_layout.unet_config(shapes, head_dim=None if self._version == 1 else 64)

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        return unet_layout.diffusion_of_checkpoint(checkpoint, self._parameterization(checkpoint))

    def usual_side(self, diffusion: Diffusion) -> int:
        # 768 is that of the v-prediction release.
        return 768 if self._version == 2 and diffusion.parameterization == "v" else 512

    def kohya_version(self, parameterization: str) -> str:
        return f"sd_v{self._version}" + ("_v" if parameterization == "v" else "")

    def modelspec_architecture(self, parameterization: str) -> str:
        if self._version == 1:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if parameterization == "v" else "stable-diffusion-v2-512"

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        paths = (
            written_paths(text_encoders["text_encoder"])
            if text_encoders
            else released_paths(layers=_ENCODER_LAYERS[self._version])
        )
        return {
            "text_encoder": EncoderNames(
                paths,
                kohya=("lora_te_", "lora_te1_"),
                comfyui=("clip_l", "clip_h") if self._version == 1 else ("clip_h", "clip_l"),
                drops_text_model=True,
            )
        }

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        return {component: trained_paths(encoder) for component, encoder in text_encoders.items()}

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        encoder, text = self.text_encoder(encoders, "text_encoder"), texts["text_encoder"]
        # Version 2's encoder is loaded without its last layer, so one skip is already done.
        skip = encoding.skip_layers if self._version == 1 else max(0, encoding.skip_layers - 1)
        context, pooled = encode_prompt(text, encoders.tokenizers["text_encoder"], encoder, skip_layers=skip)
        return Conditioning({"context": context, "pooled": pooled}, text)

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        return {"context": (1, 77, denoiser.config.cross_attention_dim)}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = denoiser(
            latents, time, encoder_hidden_states=conditioning.tensors["context"], return_dict=False
        )[0]
        return prediction

    def _parameterization(self, checkpoint: OriginalCheckpoint) -> str:
        """`v` or `epsilon`, which most files do not state."""
        declared = unet_layout.said_parameterization(checkpoint)
        if declared is not None or self._version == 1:
            return declared or "epsilon"
        # Of the two 2.x releases, the v-prediction one has a widely spread bias here (0.15 against 0.05).
        name = f"{checkpoint.denoiser_prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        return "v" if name in checkpoint.shapes and checkpoint.vector(name).float().std() > 0.09 else "epsilon"


register(StableDiffusion(1), "sd1.5", "stable-diffusion-1")
register(StableDiffusion(2), "sd2.1", "stable-diffusion-2")
_OTHERS = (
    Signature("Stable Diffusion", unet_layout.CROSS_ATTENTION, order=6),
    Signature("Stable Diffusion", r"(down|up|input|output)_blocks_\d|(mid|middle)_block_", order=8),
)
"""Of models of this architecture with no sign of their version."""
SIGNATURES.append(lambda: _OTHERS)
