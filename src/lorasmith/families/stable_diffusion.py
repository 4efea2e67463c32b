"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752): a UNet, a CLIP text encoder, a KL autoencoder.

Both versions share everything but the text encoder (OpenAI CLIP-L, OpenCLIP-H without its last layer), the width of the
attention heads and, for the 768-pixel 2.x models, the parameterization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed
from lorasmith.diffusion.parameterization import PARAMETERIZATIONS
from lorasmith.diffusion.schedule import DiscreteSchedule
from lorasmith.families.base import (
    FAMILIES,
    Components,
    Conditioning,
    Defaults,
    Family,
    LatentFormat,
    TargetPreset,
)
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.files.original_weights import (
    build,
    from_original_tensors,
    module_paths,
    part_of_folder,
    weight_shapes,
)
from lorasmith.families.parts import clip_layout, unet_layout, vae_layout
from lorasmith.families.parts.clip_text import clip_tokenizer, encode_prompt
from lorasmith.formats.names.model_names import EncoderNames, ModelNames, OriginalName

__all__ = ["StableDiffusion", "components_of"]

_ATTENTION = ("*.attn1.to_*", "*.attn2.to_*")
_TARGETS = {
    "attention": TargetPreset(_ATTENTION),
    "attention+ff": TargetPreset((*_ATTENTION, "*.ff.net.*")),
    "transformer": TargetPreset((*_ATTENTION, "*.ff.net.*", "*.attentions.*.proj_in", "*.attentions.*.proj_out")),
    "all-linear": TargetPreset(("*",), linear_only=True),
    "all": TargetPreset(("*",)),
}
_SCALE = 0.18215
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_OPENCLIP_H_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last


class StableDiffusion(Family):
    """One version of Stable Diffusion before XL.

    Args:
        version: 1 or 2.
    """

    modelspec_implementation = "diffusers"
    targets = _TARGETS
    repeatable_context = True

    def __init__(self, version: int) -> None:
        self._version = version
        self.name = f"sd{version}"
        self.title = f"Stable Diffusion {version}.x"
        self._context_width = {1: 768, 2: 1024}[version]

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if "input_blocks.0.0.weight" not in shapes or shapes["input_blocks.0.0.weight"][1] != 4:
            return False
        contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
        # Small models of this architecture have narrower contexts than any release; they count as version 1.
        return contexts == {self._context_width} or (self._version == 1 and len(contexts) == 1 and max(contexts) < 768)

    def recognises_folder(self, folder: Path) -> bool:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if index.get("_class_name") != "StableDiffusionPipeline":
            return False
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("cross_attention_dim") == 1024) == (self._version == 2)

    def from_original(self, checkpoint: OriginalCheckpoint, dtype: torch.dtype) -> Components:
        from diffusers import UNet2DConditionModel

        tensors = checkpoint.load_packed(checkpoint.denoiser_prefix, dtype)
        said = checkpoint.architecture
        config = unet_layout.unet_config(checkpoint.denoiser_shapes, head_dim=None if self._version == 1 else 64)
        config |= said.get("unet", {})
        unet = build(
            UNet2DConditionModel, config, lambda model: from_original_tensors(model, _unet_table(model), tensors)
        )
        encoder = self._original_text_encoder(checkpoint)
        parameterization = self._parameterization(checkpoint, tensors)
        return components_of(
            unet,
            _original_vae(checkpoint),
            parameterization=parameterization,
            text_encoders={} if encoder is None else {"text_encoder": encoder},
            tokenizers={} if encoder is None else {"tokenizer": self._tokenizer(encoder)},
            # The v-prediction release of version 2 is the one for 768 pixels.
            overrides={"resolution": 768} if self._version == 2 and parameterization == "v" else said.get("defaults"),
        )

    def from_folder(self, folder: Path, dtype: torch.dtype) -> Components:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        for part in ("tokenizer", "scheduler"):
            if not (folder / part).is_dir():
                raise ModelError(f"{folder} must hold a folder {part} but does not; it is incomplete, so get it again")
        parameterization, schedule = self._scheduler(folder)
        extra = folder / "lorasmith.json"
        return components_of(
            part_of_folder(UNet2DConditionModel, folder, "unet", torch_dtype=dtype),
            part_of_folder(AutoencoderKL, folder, "vae", torch_dtype=torch.float32),
            parameterization=parameterization,
            schedule=schedule,
            text_encoders={"text_encoder": part_of_folder(CLIPTextModel, folder, "text_encoder", dtype=torch.float32)},
            tokenizers={"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)},
            overrides=json.loads(extra.read_text(encoding="utf-8")) if extra.is_file() else {},
        )

    def kohya_version(self, parameterization: str) -> str:
        return f"sd_v{self._version}" + ("_v" if parameterization == "v" else "")

    def modelspec_architecture(self, parameterization: str) -> str:
        if self._version == 1:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if parameterization == "v" else "stable-diffusion-v2-512"

    def names(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> ModelNames:
        table, shapes = _unet_table(denoiser), weight_shapes(denoiser)
        return ModelNames(
            family=self.name,
            denoiser=table,
            weight_shapes=shapes,
            text_encoders={
                "text_encoder": EncoderNames(
                    clip_layout.written_paths(text_encoders["text_encoder"])
                    if text_encoders
                    else clip_layout.released_paths(layers=12 if self._version == 1 else _OPENCLIP_H_LAYERS - 1),
                    kohya=("lora_te_", "lora_te1_"),
                    comfyui=("clip_l", "clip_h") if self._version == 1 else ("clip_h", "clip_l"),
                    drops_text_model=True,
                )
            },
            kohya_naming="diffusers",
            peft_prefix="unet",
            portable="kohya",
            limits=unet_layout.UNET_LIMITS,
        )

    def encode_text(self, components: Components, text: str, *, skip_layers: int = 0) -> Conditioning:
        if "text_encoder" not in components.text_encoders:
            raise ModelError(f"this {self.title} file has no text encoder; load a full checkpoint to encode prompts")
        # Version 2's encoder is loaded without its last layer, so the first skip is already taken.
        skip = skip_layers if self._version == 1 else max(0, skip_layers - 1)
        context, pooled = encode_prompt(
            text, components.tokenizers["tokenizer"], components.text_encoders["text_encoder"], skip_layers=skip
        )
        return Conditioning({"context": context, "pooled": pooled}, text)

    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        config: Any = denoiser.config
        return {"context": (1, 77, config.cross_attention_dim)}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = denoiser(
            latents, time, encoder_hidden_states=conditioning.tensors["context"], return_dict=False
        )[0]
        return prediction

    def _scheduler(self, folder: Path) -> tuple[str, DiscreteSchedule]:
        """Parameterization and noise schedule of a diffusers folder. Raises ModelError for those not known here."""
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        expected = {"beta_schedule": "scaled_linear", "trained_betas": None, "rescale_betas_zero_snr": False}
        for key, value in expected.items():
            # diffusers' own default of the first is "linear", which no release of Stable Diffusion has.
            found = config.get(key, None if key == "beta_schedule" else value)
            if found != value:
                raise ModelError(
                    f"{key} in the scheduler_config.json of {folder.name} must be {value!r} as in {self.title}'s "
                    f"releases, got {found!r}; other noise schedules are not supported"
                )
        predicted = config.get("prediction_type", "epsilon")
        if predicted not in PARAMETERIZATIONS:
            raise ModelError(
                f"prediction_type in the scheduler_config.json of {folder.name} must be epsilon or v_prediction, "
                f"got {predicted!r}; models that predict something else are not supported"
            )
        betas = (config.get(key, value) for key, value in _BETAS.items())
        return PARAMETERIZATIONS.canonical(predicted), DiscreteSchedule.scaled_linear(*betas)

    def _parameterization(self, checkpoint: OriginalCheckpoint, unet: Mapping[str, Tensor | Packed]) -> str:
        """`v` for v-prediction checkpoints, which nothing in most files says outright."""
        said = checkpoint.metadata.get("modelspec.prediction_type")
        if said is not None:
            return "v" if said.startswith("v") else "epsilon"
        if "v_pred" in checkpoint.shapes:
            return "v"
        # Of the two 2.x releases, the v-prediction one has a widely spread bias here (0.15 against 0.05).
        probe = unet.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
        return "v" if self._version == 2 and isinstance(probe, Tensor) and probe.float().std() > 0.09 else "epsilon"

    def _tokenizer(self, encoder: nn.Module) -> Any:
        size = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return clip_tokenizer(pad_token="<|endoftext|>" if self._version == 1 else "!", size=size)

    def _original_text_encoder(self, checkpoint: OriginalCheckpoint) -> nn.Module | None:
        from transformers import CLIPTextConfig, CLIPTextModel

        prefix = {1: "cond_stage_model.transformer.", 2: "cond_stage_model.model."}[self._version]
        raw = checkpoint.load(prefix, torch.float32)
        if not raw:
            return None
        if self._version == 1:
            tensors = clip_layout.without_text_model(raw)
            settings = clip_layout.clip_config(tensors, activation="quick_gelu", pad_token_id=None)
            settings |= checkpoint.architecture.get("text_encoder", {})
        else:
            depth = sum(name.endswith(".ln_1.weight") for name in raw)
            # Files that were converted back from diffusers have lost the unused last layer already.
            layers = depth if depth == _OPENCLIP_H_LAYERS - 1 else depth - 1
            tensors = clip_layout.openclip_to_transformers(raw, layers=layers)
            settings = clip_layout.clip_config(tensors, activation="gelu", pad_token_id=0)
        config = CLIPTextConfig(**settings)
        return build(lambda **_: CLIPTextModel(config), {}, lambda model: clip_layout.renamed_for(model, tensors))


def components_of(
    unet: Any,
    vae: Any,
    *,
    parameterization: str,
    schedule: DiscreteSchedule | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Components:
    """Components from diffusers' objects; `overrides` are fields of `Defaults`."""
    config = unet.config
    downscale = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    scale = _SCALE if vae is None else float(vae.config.scaling_factor)
    defaults = {
        "resolution": config.sample_size * downscale if config.sample_size else 512,
        "pixel_multiple": downscale * 2 ** (len(config.block_out_channels) - 1),
        "learning_rate": 1e-4,
        "targets": "transformer",
        "guidance": 7.5,
        "timestep_distribution": "uniform",
        **(overrides or {}),
    }
    return Components(
        denoiser=unet,
        schedule=schedule or DiscreteSchedule.scaled_linear(),
        parameterization=parameterization,
        latent=LatentFormat(channels=config.in_channels, downscale=downscale, scale=scale),
        defaults=Defaults(**defaults),
        text_encoders=text_encoders or {},
        tokenizers=tokenizers or {},
        vae=vae,
    )


def _original_vae(checkpoint: OriginalCheckpoint) -> nn.Module | None:
    from diffusers import AutoencoderKL

    shapes = checkpoint.shapes_under("first_stage_model.")
    if not shapes:
        return None
    # The autoencoder stays in fp32: it runs once per picture, and half precision shows in what it makes.
    tensors = vae_layout.diffusers_vae(checkpoint.load("first_stage_model.", torch.float32))
    config = vae_layout.vae_config(shapes, scaling_factor=_SCALE) | checkpoint.architecture.get("vae", {})
    return build(AutoencoderKL, config, lambda model: tensors)


def _unet_table(unet: Any) -> dict[str, OriginalName]:
    """Diffusers path of every module with parameters → its original place."""
    attention = tuple("CrossAttn" in kind for kind in unet.config.up_block_types)
    layers = unet.config.layers_per_block
    return {
        path: OriginalName(unet_layout.original_unet_path(path, layers_per_block=layers, up_attention=attention))
        for path in module_paths(unet)
    }


FAMILIES.register("sd1", "sd1.5", "stable-diffusion-1")(StableDiffusion(1))
FAMILIES.register("sd2", "sd2.1", "stable-diffusion-2")(StableDiffusion(2))
