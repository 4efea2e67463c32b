"""Stable Diffusion's UNet: its two namings, diffusers' and the original (CompVis / Stability "LDM") one, and its facts.

One function maps a module path from diffusers to the original; tables for loading, saving and LoRA names are built by
applying it to the real module list of a model, and inverted from there.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from lorasmith.adapters.inject import Rule
from lorasmith.core.errors import ModelError
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule
from lorasmith.families.base import Family
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs
from lorasmith.families.files.original_weights import block_count
from lorasmith.families.forms import Defaults, Diffusion, LatentFormat
from lorasmith.formats.names import OriginalName, ProgramLimits

CROSS_ATTENTION = r"\A(?=.*?((down|up|input|output)_blocks_\d|(mid|middle)_block_)).*attn2_(processor_)?to_[kv]$"
"""Finds a LoRA's modules whose input is the text; its width distinguishes versions."""

_ATTENTION = ("*.attn1.to_*", "*.attn2.to_*")
TARGETS = {
    "attention": Rule(_ATTENTION),
    "attention+ff": Rule((*_ATTENTION, "*.ff.net.*")),
    "transformer": Rule((*_ATTENTION, "*.ff.net.*", "*.attentions.*.proj_in", "*.attentions.*.proj_out")),
}
"""Target presets of these UNets."""

UNET_LIMITS = ProgramLimits(
    unknown_to_comfyui=("*.attn[12].to_[qkv]", "*.attn[12].to_out.0"),
    diffusers_applies={"kohya": ("*",)},
    diffusers_refuses_others=True,
    diffusers_one_alpha=("*.attn[12].*",),
    sd_scripts_applies=("down_blocks.*", "mid_block.*", "up_blocks.*"),
)
"""What programs do not apply of LoRA files for this UNet."""

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}

_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


class UNetFamily(Family):
    """A family of this UNet."""

    network = "UNet2DConditionModel"
    diffusers_start = "down_blocks."
    denoiser_folder = "unet"
    limits = UNET_LIMITS
    targets = TARGETS
    repeatable_context = True
    guidance: float

    def original(self, path: str, denoiser: Any) -> OriginalName:
        attention = tuple("CrossAttn" in kind for kind in denoiser.config.up_block_types)
        layers = denoiser.config.layers_per_block
        return OriginalName(original_unet_path(path, layers_per_block=layers, up_attention=attention))

    def diffusion_of_pipeline(self, configs: PipelineConfigs) -> Diffusion:
        config = configs.of("scheduler")
        for key, value in {"beta_schedule": "scaled_linear", "trained_betas": None}.items():
            # diffusers' own default of the first is "linear", which no release of Stable Diffusion has.
            own = config.get(key, None if key == "beta_schedule" else value)
            if own != value:
                raise ModelError(
                    f"{key} in the scheduler_config.json of {configs.title} must be {value!r} as in {self.title}'s "
                    f"releases, got {own!r}; other noise schedules are not supported"
                )
        predicted = config.get("prediction_type", "epsilon")
        if predicted not in PARAMETERIZATIONS:
            raise ModelError(
                f"prediction_type in the scheduler_config.json of {configs.title} must be epsilon or v_prediction, "
                f"got {predicted!r}; models that predict something else are not supported"
            )
        schedule = DiscreteSchedule.scaled_linear(*(config.get(key, value) for key, value in _BETAS.items()))
        is_terminal = config.get("rescale_betas_zero_snr", False)
        return Diffusion(PARAMETERIZATIONS.canonical(predicted), schedule.zero_terminal() if is_terminal else schedule)

    def latent_format(self, denoiser: Any, vae: Any) -> LatentFormat:
        """Without an autoencoder a latent is eight pixels."""
        downscale = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        scale = self.autoencoder.settings["scaling_factor"] if vae is None else float(vae.config.scaling_factor)
        return LatentFormat(denoiser.config.in_channels, downscale, scale)

    @abstractmethod
    def usual_side(self, diffusion: Diffusion) -> int:
        """Side of a picture for a model that states none."""

    def defaults(self, denoiser: Any, latent: LatentFormat, diffusion: Diffusion) -> Defaults:
        stated = denoiser.config.sample_size
        return Defaults(
            resolution=stated * latent.downscale if stated else self.usual_side(diffusion),
            # So that every level of the UNet has whole pixels.
            pixel_multiple=int(latent.downscale * 2 ** (len(denoiser.config.block_out_channels) - 1)),
            targets="transformer",
            guidance=self.guidance,
            timestep_distribution="uniform",
        )


def original_unet_path(path: str, *, layers_per_block: int, up_attention: tuple[bool, ...]) -> str:
    """Original path of a diffusers UNet module."""
    if path in _TOP:
        return _TOP[path]
    if match := _MID.fullmatch(path):
        kind, index, rest = match[1], int(match[2]), match[3]
        position = 1 if kind == "attentions" else 2 * index
        return f"middle_block.{position}.{_inside(kind, rest)}"
    if not (match := _BLOCK.fullmatch(path)):
        raise KeyError(path)
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    # A down block is `layers` resnets and a downsampler, counted after conv_in; an up block is one resnet more, with
    # the upsampler appended to the last of them.
    stride = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{stride * (block + 1) - 1}.{2 if up_attention[block] else 1}.conv"
    base = f"input_blocks.{1 + stride * block + index}" if side == "down" else f"output_blocks.{stride * block + index}"
    return f"{base}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def context_widths(shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Widths of the text that an original-layout UNet attends to; none for another network, or one with other inputs.

    Four input channels are the noisy latents; inpainting and instruction models have more.
    """
    if shapes.get("input_blocks.0.0.weight", (0, 0))[1] != 4:
        return set()
    return {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}


def said_parameterization(checkpoint: OriginalCheckpoint) -> str | None:
    """`epsilon` or `v` by a checkpoint's metadata or a tensor `v_pred`; None if it has neither."""
    declared = checkpoint.metadata.get("modelspec.prediction_type")
    if declared is not None:
        return "v" if declared.startswith("v") else "epsilon"
    return "v" if "v_pred" in checkpoint.shapes else None


def diffusion_of_checkpoint(checkpoint: OriginalCheckpoint, parameterization: str) -> Diffusion:
    """Stable Diffusion's noise schedule, with zero terminal SNR if the checkpoint has a tensor `ztsnr`."""
    schedule = DiscreteSchedule.scaled_linear()
    return Diffusion(parameterization, schedule.zero_terminal() if "ztsnr" in checkpoint.shapes else schedule)


def unet_config(shapes: Mapping[str, tuple[int, ...]], *, head_dim: int | None) -> dict[str, Any]:
    """Configuration of diffusers' UNet2DConditionModel for an original-layout UNet."""
    channels, depths, layers = _levels(shapes)
    keys = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    proj_in = shapes[keys.partition(".transformer_blocks.")[0] + ".proj_in.weight"]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "cross_attention_dim": shapes[keys][1],
        # diffusers calls the number of heads attention_head_dim in these configs, and keeps the name for old files.
        "attention_head_dim": 8 if head_dim is None else tuple(max(1, width // head_dim) for width in channels),
        "use_linear_projection": len(proj_in) == 2,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "transformer_layers_per_block": tuple(max(1, depth) for depth in depths),
    }


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[int], int]:
    """Channels of each level, transformer layers of its attention (0 where it has none), and resnets per level."""
    channels: list[int] = []
    depths: list[int] = []
    counts: list[int] = []
    fresh = True
    block = 1
    while f"input_blocks.{block}.0.in_layers.0.weight" in shapes or f"input_blocks.{block}.0.op.weight" in shapes:
        if f"input_blocks.{block}.0.op.weight" in shapes:
            fresh = True
        else:
            width = shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]
            if fresh:
                channels.append(width)
                depths.append(block_count(shapes, f"input_blocks.{block}.1.transformer_blocks."))
                counts.append(0)
                fresh = False
            counts[-1] += 1
        block += 1
    if not channels:
        raise ModelError("the checkpoint lacks input_blocks.1.0.in_layers.0.weight; it is incomplete or was cut short")
    return channels, depths, counts[0]


def _inside(kind: str, rest: str) -> str:
    """Names inside a resnet differ; those inside a transformer are the same."""
    if kind == "attentions":
        return rest
    return _RESNET_PARTS[rest]
