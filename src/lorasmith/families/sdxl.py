"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): a UNet with two text encoders, conditioned on sizes.

Text is the hidden states before the last layer of CLIP-L and OpenCLIP bigG, side by side. Besides text and time the
UNet is conditioned on the projected pooled vector of bigG and on six numbers: height and width of the original picture,
top and left of the crop, height and width of the result. Fine-tunes that predict v, with zero terminal SNR (NoobAI,
Illustrious), are marked by tensors `v_pred` and `ztsnr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.families.base import register
from lorasmith.families.conditionings import Conditioning, PictureSize
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.forms import Diffusion
from lorasmith.families.parts import unet_layout
from lorasmith.families.parts.clip import encode_prompts, released_paths, trained_paths, written_paths
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, Encoding, HubFolder, Release, TextEncoders
from lorasmith.formats.names import EncoderNames
from lorasmith.formats.spelling import Signature

_CONTEXT_WIDTH = 2048
_HEAD_DIM = 64
_SIZES = 6  # numbers of the size conditioning
_SIZE_WIDTH = 256  # channels of each one's embedding
_PIXELS_PER_LATENT = 8
# Layers of the released encoders.
_ENCODER_LAYERS = {"text_encoder": 12, "text_encoder_2": 32}
# Marks of models with the noise levels of Karras et al. 2022 (Playground 2.5, CosXL).
_EDM_MARKS = ("edm_mean", "edm_vpred.sigma_max")


class StableDiffusionXL(unet_layout.UNetFamily):
    """The base model and its fine-tunes; not the refiner."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    modelspec_implementation = "https://github.com/Stability-AI/generative-models"
    kohya_name = "sdxl_base_v1-0"
    modelspec_name = "stable-diffusion-xl-v1-base"
    civitai_name = "SDXL 1.0"
    a1111_version = "SDXL"
    text_encoders = {
        "text_encoder": EncoderSlot("clip_l", "clip_l.safetensors", ("conditioner.embedders.0.transformer.",)),
        "text_encoder_2": EncoderSlot("clip_g", "clip_g.safetensors", ("conditioner.embedders.1.model.",)),
    }
    autoencoder = AutoencoderSlot(
        "kl", channels=4, usual_file="sdxl_vae.safetensors", settings={"scaling_factor": 0.13025}
    )
    clip_types = ("sdxl",)
    guidance = 5.0
    releases = (
        Release(
            name="sdxl",
            title="Stable Diffusion XL 1.0",
            about="Many styles by short prompts; quick to train on a card of 8 GB, with many LoRAs and fine-tunes.",
            file="sd_xl_base_1.0.safetensors",
            hub=HubFolder("stabilityai/stable-diffusion-xl-base-1.0", 6.94),
            licence="CreativeML Open RAIL++-M",
            card="stabilityai/stable-diffusion-xl-base-1.0",
            holds=("text_encoder", "text_encoder_2", "vae"),
        ),
    )
    released = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": _CONTEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _SIZE_WIDTH,
        "projection_class_embeddings_input_dim": 1280 + _SIZES * _SIZE_WIDTH,
    }
    lora_signatures = (
        Signature(title, unet_layout.CROSS_ATTENTION, _CONTEXT_WIDTH, order=6),
        Signature(title, r"^(lora_te2|text_encoder_2)_text_model_", order=7),
    )

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        contexts = unet_layout.context_widths(shapes)
        # Small models of this architecture have narrower contexts than any release.
        is_small = len(contexts) == 1 and max(contexts) < 768 and "label_emb.0.0.weight" in shapes
        return contexts == {_CONTEXT_WIDTH} or is_small

    def denoiser_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {
            **unet_layout.unet_config(shapes, head_dim=_HEAD_DIM),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _SIZE_WIDTH,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }

    def diffusion(self, checkpoint: OriginalCheckpoint) -> Diffusion:
        if mark := next((mark for mark in _EDM_MARKS if mark in checkpoint.shapes), None):
            raise ModelError(
                f"{checkpoint.path.name} must have the noise schedule of {self.title}, but its tensor {mark} marks "
                "continuous noise levels (Playground 2.5, CosXL), which are not supported; choose another model"
            )
        return unet_layout.diffusion_of_checkpoint(
            checkpoint, unet_layout.said_parameterization(checkpoint) or "epsilon"
        )

    def usual_side(self, diffusion: Diffusion) -> int:
        return 1024

    def encoder_names(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, EncoderNames]:
        paths = {
            component: written_paths(text_encoders[component])
            if component in text_encoders
            else released_paths(layers, is_projected=component == "text_encoder_2")
            for component, layers in _ENCODER_LAYERS.items()
        }
        return {
            "text_encoder": EncoderNames(
                paths["text_encoder"], kohya=("lora_te1_", "lora_te_"), comfyui=("clip_l",), drops_text_model=True
            ),
            "text_encoder_2": EncoderNames(paths["text_encoder_2"], kohya=("lora_te2_",), comfyui=("clip_g",)),
        }

    def trained_encoders(self, text_encoders: Mapping[str, nn.Module]) -> Mapping[str, Sequence[str]]:
        # Contexts are those before the last layer, and the pooled vector is the second encoder's.
        return {
            component: trained_paths(encoder, unused_layers=int(component == "text_encoder"))
            for component, encoder in text_encoders.items()
        }

    def encode_text(self, encoders: TextEncoders, texts: Mapping[str, str], encoding: Encoding) -> Conditioning:
        modules = [self.text_encoder(encoders, component) for component in self.text_encoders]
        prompts = [
            (texts[component], encoders.tokenizers[component], module)
            for component, module in zip(self.text_encoders, modules, strict=True)
        ]
        # The last layer is never used, so one skip is already done.
        contexts, pooled = encode_prompts(prompts, skip_layers=max(1, encoding.skip_layers))
        return Conditioning({"context": torch.cat(contexts, dim=-1), "pooled": pooled[-1]}, texts["text_encoder_2"])

    def sized(self, conditioning: Conditioning, size: PictureSize) -> Conditioning:
        # Whole numbers, which no training dtype rounds: bf16 has none between 1024 and 1032.
        sizes = torch.tensor([[*size.original, *size.crop, *size.target]])
        return replace(conditioning, tensors={**conditioning.tensors, "time_ids": sizes})

    def conditioning_shapes(self, denoiser: Any) -> Mapping[str, tuple[int, ...]]:
        pooled = (
            denoiser.config.projection_class_embeddings_input_dim - _SIZES * denoiser.config.addition_time_embed_dim
        )
        return {"context": (1, 77, denoiser.config.cross_attention_dim), "pooled": (1, pooled)}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        tensors = conditioning.tensors
        sizes = tensors["time_ids"] if "time_ids" in tensors else _uncropped(latents)
        prediction: Tensor = denoiser(
            latents,
            time,
            encoder_hidden_states=tensors["context"],
            added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
        return prediction


def _uncropped(latents: Tensor) -> Tensor:
    """(batch, 6) size conditioning of pictures that were neither scaled nor cropped, as ComfyUI assumes."""
    height, width = (side * _PIXELS_PER_LATENT for side in latents.shape[-2:])
    sizes = (height, width, 0, 0, height, width)
    # A tensor of the sizes would be copied from the host.
    return torch.stack([latents.new_full((len(latents),), siz, dtype=torch.long) for siz in sizes], dim=1)


register(StableDiffusionXL(), "stable-diffusion-xl")
