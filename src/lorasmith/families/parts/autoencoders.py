"""Kinds of autoencoders: that of latent diffusion with its two namings, Flux.2's, Wan's and HunyuanVideo 1.5's.

Flux.2's is that of latent diffusion with 32 channels, then 2×2 latents as 128 normalised channels. The normalisation's
statistics are tensors of the file (`bn.running_mean`, `bn.running_var`), so latents that leave the autoencoder are the
denoiser's already.

Wan 2.1's, which Qwen-Image, Krea 2 and Anima use too, and Wan 2.2 5B's are made for videos: pictures are one frame, and
latents have a time axis. Both packages' names are read, the original's and diffusers' (AutoencoderKLQwenImage and
AutoencoderKLWan, which have the same tensors for Wan 2.1). Wan 2.2's takes squares of 2×2 pixels as channels, and its
blocks are one level deeper in the names.

HunyuanVideo 1.5's is made for videos too, with 16 pixels per latent. The authors and diffusers let a frame attend to
itself and those before it, ComfyUI to all: latents of clips differ there, those of pictures do not. Clips are encoded
and decoded in diffusers' tiles.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import FULL_PRECISION
from lorasmith.core.quantization import plain_weights
from lorasmith.core.registry import Registry, instance_of
from lorasmith.families.files.checkpoint import CheckpointShapes
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.forms import LatentFormat
from lorasmith.families.slots import AutoencoderSlot, HubFolder

_RENAMES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.q\.", ".mid_block.attentions.0.to_q."),
    (r"\.mid\.attn_1\.k\.", ".mid_block.attentions.0.to_k."),
    (r"\.mid\.attn_1\.v\.", ".mid_block.attentions.0.to_v."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
)
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_UP = re.compile(r"^decoder\.up\.(\d{1,3})\.(block|upsample)\.(?:(\d+)\.)?")


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration of diffusers' AutoencoderKL for tensors under its names, as far as shapes determine it."""
    levels = block_count(shapes, "encoder.down_blocks.") or 1
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)
        ),
        "layers_per_block": block_count(shapes, "encoder.down_blocks.0.resnets."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def diffusers_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under diffusers' names; attention's 1×1 convolutions become matrices.

    Tensors under these names already are kept. Tensors of its training (losses, counters of averages) are left out.
    """
    levels = block_count(tensors, "decoder.up.")
    converted = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PARTS):
            continue
        new = _UP.sub(lambda match: _up_block(match, levels), name)
        for pattern, replacement in _RENAMES:
            new = re.sub(pattern, replacement, new)
        if ".attentions." in new and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        converted[new] = tensor
    return converted


def _up_block(match: re.Match[str], levels: int) -> str:
    # The original counts up blocks from the finest level, diffusers in the order they run.
    block = levels - 1 - int(match[1])
    inside = "upsamplers.0" if match[2] == "upsample" else f"resnets.{match[3]}"
    return f"decoder.up_blocks.{block}.{inside}."


FLUX2_AUTOENCODER = AutoencoderSlot(
    "flux2",
    channels=128,
    usual_file="flux2-vae.safetensors",
    prefixes=("vae.",),
    downscale=16,
    hub=HubFolder("Comfy-Org/Flux-2-Klein-4B/split_files/vae", 0.34),
)
"""Flux.2's autoencoder, which ERNIE-Image has too."""

FLUX_AUTOENCODER = AutoencoderSlot(
    "kl",
    channels=16,
    usual_file="ae.safetensors",
    prefixes=("vae.", "first_stage_model."),
    settings={"scaling_factor": 0.3611, "shift_factor": 0.1159},
    hub=HubFolder("Comfy-Org/Z-Image/split_files/vae", 0.34),
)
"""Flux.1's autoencoder, which Chroma, Lumina 2 and Z-Image have too."""

PLACES_FIRST = "places_first"
"""Setting of Flux.2's autoencoder: whether its statistics have the places of a patch before the channels."""

LATENT_MEANS = "bn.running_mean"
"""Tensor of autoencoders that normalise their latents by statistics of their own, as Flux.2's does."""


class AutoencoderKind(ABC):
    """A kind of autoencoder, by its registered name."""

    name: str

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are the tensors of such an autoencoder, in the original naming or in diffusers'."""

    @abstractmethod
    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Channels of its latents."""

    @abstractmethod
    def build(self, source: PartSource) -> nn.Module:
        """The autoencoder, from tensors in the original naming or diffusers'. Raises ModelError if some do not fit."""

    @abstractmethod
    def latent_format(self, vae: Any) -> LatentFormat:
        """Channels, pixels and frames per latent of its latents; scale 1 and shift 0."""

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents (the distribution's mean) of pixels (batch, 3, height, width) in [−1, 1].

        Kinds whose latents have a time axis take pixels (batch, 3, frames, height, width) as well, of a number of
        frames that makes whole latents (`LatentFormat.whole_frames`).
        """
        latents: Tensor = vae.encode(pixels).latent_dist.mean
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), about in [−1, 1], of latents.

        Those of latents with a time axis are (batch, 3, frames, height, width).
        """
        pixels: Tensor = vae.decode(latents).sample
        return pixels


class KlAutoencoder(AutoencoderKind):
    """The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), which Flux.1 has too."""

    name = "kl"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return len(shapes.get("decoder.conv_in.weight", ())) == 4 and not {LATENT_MEANS, _DIFFUSERS} & shapes.keys()

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["decoder.conv_in.weight"][1]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKL

        named = diffusers_vae(plain_weights(source.tensors))
        config = source.config
        if config is None:
            shapes = CheckpointShapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = vae_config(shapes) | dict(source.settings)
        return build(lambda: AutoencoderKL.from_config(config), lambda _: named, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        config = vae.config
        return LatentFormat(config.latent_channels, 2 ** (len(config.block_out_channels) - 1), scale=1.0)


AUTOENCODERS: Registry[AutoencoderKind] = Registry(
    "autoencoder",
    ModelError,
    group="autoencoders",
    home="lorasmith.families.known",
    checked=instance_of(AutoencoderKind),
)
AUTOENCODERS.register(KlAutoencoder.name)(KlAutoencoder())


def recognised_autoencoder(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderKind | None:
    """The kind of autoencoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in AUTOENCODERS.items() if kind.recognises(shapes)), None)


_PATCH = 2


class Flux2Autoencoder(AutoencoderKind):
    """Flux.2's, also the variant with a small decoder."""

    name = "flux2"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return LATENT_MEANS in shapes and len(shapes.get("decoder.conv_in.weight", ())) == 4

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes[LATENT_MEANS][0]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLFlux2

        plain = plain_weights(source.tensors)
        statistics = {name: tensor for name, tensor in plain.items() if name.startswith("bn.")}
        if source.settings.get(PLACES_FIRST):
            ordered = {
                name: statistic.reshape(_PATCH**2, -1).T.reshape(-1)
                for name, statistic in statistics.items()
                if statistic.ndim
            }
            statistics |= ordered
        named = diffusers_vae({name: tensor for name, tensor in plain.items() if name not in statistics})
        config = source.config
        if config is None:
            shapes = CheckpointShapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            config = {**vae_config(shapes), **source.settings}
            levels = reversed(range(block_count(shapes, "decoder.up_blocks.") or 1))
            decoder = tuple(shapes[f"decoder.up_blocks.{level}.resnets.0.conv2.weight"][0] for level in levels)
            if decoder != config["block_out_channels"]:
                config["decoder_block_out_channels"] = decoder

        def make() -> nn.Module:
            vae: Any = AutoencoderKLFlux2.from_config(config)
            setattr(vae.bn, FULL_PRECISION, True)
            return vae  # type: ignore[no-any-return]

        return build(make, lambda _: {**named, **statistics}, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        downscale = _PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        return LatentFormat(vae.config.latent_channels * _PATCH**2, downscale, scale=1.0)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        return (F.pixel_unshuffle(super().encode(vae, pixels), _PATCH) - mean) / deviation

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        return super().decode(vae, F.pixel_shuffle(latents * deviation + mean, _PATCH))


AUTOENCODERS.register(Flux2Autoencoder.name)(Flux2Autoencoder())


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, channels, 1, 1)."""
    mean, variance = (statistic.reshape(1, -1, 1, 1) for statistic in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
LATENT_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


def wan_latents(
    mean: tuple[float, ...] = LATENT_MEAN,
    deviation: tuple[float, ...] = LATENT_STD,
    *,
    downscale: int = 8,
    time_downscale: int = 0,
) -> LatentFormat:
    """The format in which denoisers take these latents: each channel with mean 0 and deviation 1."""
    scale = tuple(1 / value for value in deviation)
    return LatentFormat(len(mean), downscale, scale, shift=mean, frames=True, time_downscale=time_downscale)


QWEN_AUTOENCODER = AutoencoderSlot(
    "wan21",
    channels=16,
    usual_file="qwen_image_vae.safetensors",
    prefixes=("vae.",),
    latent=wan_latents(),
    hub=HubFolder("Comfy-Org/Qwen-Image/split_files/vae", 0.25),
)
"""Wan 2.1's autoencoder, as models of pictures have it."""

_ORIGINAL, _DIFFUSERS = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
_DEEPER = "decoder.upsamples.0.upsamples.0.residual.0.gamma"  # Wan 2.2's
_UPSAMPLER, _DEEPER_UPSAMPLER = (
    f"decoder.up_blocks.0.{name}.time_conv.weight" for name in ("upsamplers.0", "upsampler")
)
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
_SIDE = 2  # of the squares of pixels that Wan 2.2's takes as channels


class _OfFrames(AutoencoderKind):
    """Kinds whose latents have a time axis."""

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        return super().encode(vae, pixels if pixels.ndim == 5 else pixels.unsqueeze(2))


class _Wan(_OfFrames):
    """What both versions share."""

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes["conv2.weight" if "conv2.weight" in shapes else "post_quant_conv.weight"][0]


class WanAutoencoder(_Wan):
    """Wan 2.1's: 16 channels, 8 pixels per latent."""

    name = "wan21"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (_ORIGINAL in shapes and _DEEPER not in shapes) or (_DIFFUSERS in shapes and _UPSAMPLER in shapes)

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        named = {_diffusers_name(name): tensor for name, tensor in plain_weights(source.tensors).items()}
        config = source.config or {
            "base_dim": named["encoder.conv_in.weight"].shape[0],
            "z_dim": named["post_quant_conv.weight"].shape[0],
            **source.settings,
        }
        known = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
        wanted = {name: value for name, value in config.items() if name in known}
        return build(lambda: AutoencoderKLQwenImage(**wanted), lambda _: named, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        return _form(vae, vae.spatial_compression_ratio)


class Wan22Autoencoder(_Wan):
    """Wan 2.2 5B's: 48 channels, 16 pixels per latent."""

    name = "wan22"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        is_named = _DEEPER in shapes or (_DIFFUSERS in shapes and _DEEPER_UPSAMPLER in shapes)
        return is_named and not _has_flat_kernels(shapes)

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLWan

        tensors = plain_weights(source.tensors)
        named = {_diffusers_name(name, is_deeper=True): tensor for name, tensor in tensors.items()}
        config = source.config or _config_22(
            CheckpointShapes((name, tuple(tensor.shape)) for name, tensor in named.items())
        )
        return build(
            lambda: AutoencoderKLWan.from_config({**config, **source.settings}), lambda _: named, where=source.where
        )

    def latent_format(self, vae: Any) -> LatentFormat:
        # Each level of blocks but the last halves the sides; `spatial_compression_ratio` is for diffusers' tiles.
        side = 2 ** len(vae.config.temperal_downsample) * vae.config.patch_size
        return _form(vae, side)


class QwenImage21Autoencoder(_Wan):
    """Qwen-Image 2.1's: 64 channels, 16 pixels per latent, opacity beside colours."""

    name = "qwen_image21"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (_DEEPER in shapes or _DIFFUSERS in shapes) and _has_flat_kernels(shapes)

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage21

        tensors = plain_weights(source.tensors)
        named = {_diffusers_name(name, is_deeper=True): tensor for name, tensor in tensors.items()}
        config = source.config or {
            "base_dim": named["encoder.conv_in.weight"].shape[0],
            "decoder_base_dim": named["decoder.norm_out.gamma"].shape[0],
            "z_dim": named["post_quant_conv.weight"].shape[0],
            **source.settings,
        }
        return build(lambda: AutoencoderKLQwenImage21.from_config(config), lambda _: named, where=source.where)

    def latent_format(self, vae: Any) -> LatentFormat:
        return LatentFormat(vae.config.z_dim, 2 ** len(vae.config.temperal_downsample), scale=1.0)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        opaque = torch.cat((pixels, torch.ones_like(pixels[:, :1])), dim=1)
        return super().encode(vae, opaque.unsqueeze(2)).squeeze(2)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        found = super().decode(vae, latents.unsqueeze(2)).squeeze(2)
        opacity = found[:, 3:] / 2 + 0.5
        return found[:, :3] * opacity + 1 - opacity


AUTOENCODERS.register(WanAutoencoder.name)(WanAutoencoder())
AUTOENCODERS.register(Wan22Autoencoder.name)(Wan22Autoencoder())
AUTOENCODERS.register(QwenImage21Autoencoder.name)(QwenImage21Autoencoder())


def _has_flat_kernels(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether kernels have no time axis."""
    return any(len(shapes.get(f"decoder.{name}.weight", ())) == 4 for name in ("conv1", "conv_in"))


def _form(vae: Any, downscale: int) -> LatentFormat:
    times = 2 ** sum(vae.config.temperal_downsample)
    return LatentFormat(vae.config.z_dim, downscale, scale=1.0, frames=True, time_downscale=times)


def _config_22(shapes: CheckpointShapes) -> dict[str, Any]:
    """Configuration of Wan 2.2's for shapes by diffusers' names."""
    channels = shapes["encoder.conv_in.weight"][1]
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
        "z_dim": shapes["post_quant_conv.weight"][0],
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": _SIDE,
        "is_residual": True,
        "scale_factor_spatial": 16,
        "latents_mean": LATENT_MEAN_22,
        "latents_std": LATENT_STD_22,
    }


def _diffusers_name(name: str, *, is_deeper: bool = False) -> str:
    """diffusers' name of an original tensor; its own names are unchanged."""
    side, _, rest = name.partition(".")
    if side in ("conv1", "conv2"):
        return f"{'quant_conv' if side == 'conv1' else 'post_quant_conv'}.{rest}"
    kind, _, rest = rest.partition(".")
    if kind == "conv1":
        return f"{side}.conv_in.{rest}"
    if kind == "head":
        number, _, leaf = rest.partition(".")
        return f"{side}.{'norm_out' if number == '0' else 'conv_out'}.{leaf}"
    if kind not in ("middle", "downsamples", "upsamples"):
        return name
    index, _, rest = rest.partition(".")
    if kind == "middle":
        return f"{side}.mid_block.{_MIDDLE[int(index)]}.{_resnet(rest)}"
    if is_deeper:
        return f"{side}.{'down' if kind == 'downsamples' else 'up'}_blocks.{index}.{_layer_of_block(rest)}"
    if kind == "downsamples":
        return f"{side}.down_blocks.{index}.{_resnet(rest)}"
    block, place = divmod(int(index), 4)
    return f"{side}.up_blocks.{block}.{'upsamplers.0' if place == 3 else f'resnets.{place}'}.{_resnet(rest)}"


def _layer_of_block(rest: str) -> str:
    """A name within one of Wan 2.2's blocks: residual blocks, then what changes the size."""
    kind, index, rest = rest.split(".", 2)
    is_resnet = rest.startswith(("residual.", "shortcut."))
    return f"resnets.{index}.{_resnet(rest)}" if is_resnet else f"{kind.removesuffix('s')}r.{rest}"


def _resnet(rest: str) -> str:
    """A name within a block, in which the original numbers the layers of the residual path."""
    if (match := re.match(r"residual\.(\d)\.", rest)) is not None:
        return f"{_RESIDUAL[match[1]]}.{rest[match.end() :]}"
    return re.sub(r"^shortcut\.", "conv_shortcut.", rest)


_HUNYUAN_RENAMES = (
    (r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
)
_HUNYUAN_FIRST = "decoder.conv_in.conv.weight"


class HunyuanVideo15Autoencoder(_OfFrames):
    """HunyuanVideo 1.5's: 32 channels, 16 pixels per latent."""

    name = "hunyuan_video15"

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        norms = {f"decoder.{block}.norm1.gamma" for block in ("mid.block_1", "mid_block.resnets.0")}
        return _HUNYUAN_FIRST in shapes and bool(norms & shapes.keys())

    def channels(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes[_HUNYUAN_FIRST][1]

    def build(self, source: PartSource) -> nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo15

        named = {}
        for name, tensor in plain_weights(source.tensors).items():
            for pattern, replacement in _HUNYUAN_RENAMES:
                name = re.sub(pattern, replacement, name)
            named[name] = tensor
        config = source.config
        if config is None:
            shapes = CheckpointShapes((name, tuple(tensor.shape)) for name, tensor in named.items())
            blocks = range(block_count(shapes, "encoder.down_blocks."))
            widths = tuple(shapes[f"encoder.down_blocks.{block}.resnets.0.conv2.conv.weight"][0] for block in blocks)
            config = {
                "latent_channels": self.channels(shapes),
                "block_out_channels": widths,
                "layers_per_block": block_count(shapes, "encoder.down_blocks.0.resnets."),
                **source.settings,
            }

        def make() -> nn.Module:
            vae: Any = AutoencoderKLHunyuanVideo15.from_config(config)
            for part in (vae.encoder, vae.decoder):
                for attention in part.mid_block.attentions:
                    attention.forward = MethodType(_attended_by_frame, attention)
            return vae  # type: ignore[no-any-return]

        return build(make, lambda _: named, where=source.where)

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        vae.use_tiling = pixels.ndim == 5 and pixels.shape[2] > 1  # of 256 px; whole clips take tens of GB
        return super().encode(vae, pixels)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        vae.use_tiling = latents.shape[2] > 1
        return super().decode(vae, latents)

    def latent_format(self, vae: Any) -> LatentFormat:
        config = vae.config
        return LatentFormat(
            config.latent_channels,
            config.spatial_compression_ratio,
            scale=1.0,
            frames=True,
            time_downscale=config.temporal_compression_ratio,
        )


AUTOENCODERS.register(HunyuanVideo15Autoencoder.name)(HunyuanVideo15Autoencoder())


def _attended_by_frame(self: Any, states: Tensor) -> Tensor:
    """The forward pass of an attention without diffusers' mask, which has a number for each pair of latents."""
    normed = self.norm(states)
    query, key, value = (
        layer(normed).permute(0, 2, 3, 4, 1).flatten(2, 3) for layer in (self.to_q, self.to_k, self.to_v)
    )
    mixed = [
        F.scaled_dot_product_attention(
            query[:, [frame]], *(rows[:, : frame + 1].flatten(1, 2)[:, None] for rows in (key, value))
        )
        for frame in range(query.shape[1])
    ]
    rows = torch.cat(mixed, dim=1).unflatten(2, states.shape[3:]).permute(0, 4, 1, 2, 3)
    return self.proj_out(rows) + states  # type: ignore[no-any-return]
