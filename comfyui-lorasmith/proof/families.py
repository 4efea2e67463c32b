"""Small models of random weights, and conditionings for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


@dataclass(frozen=True)
class Small:
    """A small model of a family."""

    make: Callable[[dict[str, Any]], torch.nn.Module]  # a network from ComfyUI's own class
    channels: int
    context: int  # width
    options: Callable[[torch.Generator], dict[str, Any]] = field(default=lambda generator: {})  # of a conditioning
    tokens: int = 77
    frames: int = 0


def _unet(common: dict[str, Any], **settings: Any) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    given = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        context_dim=768,
        use_linear_in_transformer=False,
        channel_mult=[1, 2],
        num_res_blocks=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1, 1, 1],
    )
    return UNetModel(**{**given, **settings}, **common)


def _flux(common: dict[str, Any], **settings: Any) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux

    given = dict(
        in_channels=16,
        out_channels=16,
        patch_size=2,
        mlp_ratio=4.0,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        hidden_size=384,
        num_heads=3,
        depth=2,
        depth_single_blocks=4,
        context_in_dim=768,
        vec_in_dim=256,
    )
    return Flux(**{**given, **settings}, **common)


def _pooled(width: int, **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator), **options}


FAMILIES = {
    "sd1": Small(_unet, channels=4, context=768),
    "flux": Small(_flux, channels=16, context=768, options=_pooled(256, guidance=3.5)),
}


def model_of(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL, through ComfyUI's own loader of files."""
    import comfy.ops
    import comfy.sd

    path = folder / f"{name}-{str(dtype).removeprefix('torch.')}.safetensors"
    if not path.exists():
        common = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
        network = FAMILIES[name].make(common)
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for key, tensor in network.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                values *= 0.7 / tensor[0].numel() ** 0.5
            elif key.endswith(("weight", "scale")):
                values = 1 + 0.05 * values
            else:
                values *= 0.02
            tensors[f"model.diffusion_model.{key}"] = values.to(dtype)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, path)
    return comfy.sd.load_diffusion_model(str(path))


def data_of(name: str, *, count: int = 4, side: int = 16) -> tuple[list[torch.Tensor], list[list[Any]]]:
    """Latents and a CONDITIONING of as many entries."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(12345)
    shape = (1, family.channels, *([family.frames] if family.frames else []), side, side)
    latents = [torch.randn(shape, generator=generator) for _ in range(count)]
    positive = [
        [torch.randn(1, family.tokens, family.context, generator=generator), family.options(generator)]
        for _ in range(count)
    ]
    return latents, positive
