"""Nodes for latents: encode, decode, batch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.model import Autoencoder
from lorasmith.families.tiling import decode_tiled
from lorasmith.nodes.images import resized
from lorasmith.nodes.values import (
    Latent,
    check_latents,
    flat_latents,
    image_from_pixels,
    latent_of,
    pixels_from_image,
    single,
    with_frames,
)
from lorasmith.workflow import NodeContext, Output, node, socket

_TEMPORAL = "No effect: frames are decoded one after the other."


@node("VAEEncode", "VAE Encode", "model/latent", outputs=["LATENT"])
def vae_encode(
    context: NodeContext, *, pixels: Tensor = socket("IMAGE"), vae: Autoencoder = socket("VAE")
) -> tuple[Latent]:
    """Encode pictures into latents; edges are cropped to whole latents. A batch is one clip for a VAE of videos."""
    with vae.active():
        return ({"samples": vae.encode(pixels_from_image(context, pixels, vae))},)


@node("VAEDecode", "VAE Decode", "model/latent", outputs=["IMAGE"])
def vae_decode(
    context: NodeContext, *, samples: Latent = socket("LATENT"), vae: Autoencoder = socket("VAE")
) -> tuple[Tensor]:
    """Decode latents into pictures, clips into their frames."""
    latents = with_frames(samples["samples"], vae.latent)
    check_latents(latents, vae.latent)
    with vae.active():
        return (image_from_pixels(vae.decode_frames(latents)),)


@node("VAEDecodeTiled", "VAE Decode (Tiled)", "model/latent", outputs=["IMAGE"])
def vae_decode_tiled(
    context: NodeContext,
    *,
    samples: Latent = socket("LATENT"),
    vae: Autoencoder = socket("VAE"),
    tile_size: int = socket("INT", default=512, min=64, max=4096, step=32, tooltip="Side of a tile in pixels."),
    overlap: int = socket("INT", default=64, min=0, max=4096, step=32, tooltip="Of neighbouring tiles, in pixels."),
    temporal_size: int = socket("INT", default=64, min=8, max=4096, step=4, tooltip=_TEMPORAL),
    temporal_overlap: int = socket("INT", default=8, min=4, max=4096, step=4, tooltip=_TEMPORAL),
) -> tuple[Tensor]:
    """Decode latents in tiles, which takes less memory; colours may differ slightly between tiles."""
    latents = with_frames(samples["samples"], vae.latent)
    check_latents(latents, vae.latent)
    scale = vae.latent.downscale
    with vae.active():
        pixels = decode_tiled(
            vae.decode_frames,
            latents,
            downscale=scale,
            tile=max(1, tile_size // scale),
            overlap=min(overlap, tile_size // 4) // scale,  # a larger overlap is cut as in ComfyUI
            before_tile=context.advance,
        )
    return (image_from_pixels(pixels),)


@node("SetLatentNoiseMask", "Set Latent Noise Mask", "model/latent", outputs=["LATENT"])
def set_latent_noise_mask(
    context: NodeContext,
    *,
    samples: Latent = socket("LATENT"),
    mask: Tensor = socket("MASK", tooltip="White is sampled; black stays as it is."),
) -> tuple[Latent]:
    """Sample a part of latents alone; training ignores the mask."""
    return ({**samples, "noise_mask": mask.unsqueeze(1)},)


def _side(default: int, step: int = 16) -> Any:
    return socket("INT", default=default, min=16, max=16384, step=step, tooltip="In pixels.")


_BATCH_SIZE = socket("INT", default=1, min=1, max=4096, tooltip="Number of pictures.")


def _declare_empty(
    id: str, display_name: str, category: str, description: str, *, channels: int, downscale: int = 8, side: Any
) -> None:
    """Declare a node of empty latents; `side` is the input of width and height."""

    def empty(
        context: NodeContext, *, width: int = side, height: int = side, batch_size: int = _BATCH_SIZE
    ) -> tuple[Latent]:
        samples = torch.zeros(batch_size, channels, height // downscale, width // downscale)
        return (latent_of(samples, downscale),)

    empty.__doc__ = f"Empty latents {description}; KSampler adapts their shape to its model."
    node(id, display_name, category, outputs=["LATENT"])(empty)


_declare_empty(
    "EmptyLatentImage", "Empty Latent Image", "model/latent", "for new pictures", channels=4, side=_side(512, step=8)
)
_declare_empty(
    "EmptySD3LatentImage",
    "EmptySD3LatentImage",
    "model/latent/stable diffusion",
    "of 16 channels",
    channels=16,
    side=_side(1024),
)
_declare_empty(
    "EmptyFlux2LatentImage",
    "Empty Flux 2 Latent",
    "model/latent/flux",
    "of Flux.2",
    channels=128,
    downscale=16,
    side=_side(1024),
)


def _declare_empty_clip(id: str, display_name: str, *, channels: int, downscale: int) -> None:
    """Declare a node of empty latents of clips."""

    def empty(
        context: NodeContext,
        *,
        width: int = _side(848),
        height: int = _side(480),
        length: int = socket("INT", default=25, min=1, max=16384, step=4, tooltip="In frames; 1 for pictures."),
        batch_size: int = _BATCH_SIZE,
    ) -> tuple[Latent]:
        """Empty latents with a time axis; KSampler adapts their shape to its model, and takes a frame for pictures."""
        frames = (length - 1) // 4 + 1
        return (
            latent_of(torch.zeros(batch_size, channels, frames, height // downscale, width // downscale), downscale),
        )

    node(id, display_name, "model/latent/hunyuan video", outputs=["LATENT"])(empty)


_declare_empty_clip("EmptyHunyuanLatentVideo", "Empty HunyuanVideo 1.0 Latent", channels=16, downscale=8)
_declare_empty_clip("EmptyHunyuanVideo15Latent", "Empty HunyuanVideo 1.5 Latent", channels=32, downscale=16)


@node("LatentBatch", "Batch Latents (DEPRECATED)", "model/latent/batch", outputs=["LATENT"], deprecated=True)
def latent_batch(
    context: NodeContext, *, samples1: Latent = socket("LATENT"), samples2: Latent = socket("LATENT")
) -> tuple[Latent]:
    """Join two batches of latents; the second is scaled and cropped to the size of the first."""
    first, second = samples1["samples"], samples2["samples"]
    if first.ndim != second.ndim or first.shape[1] != second.shape[1]:
        raise DataError(
            f"latents of one batch must be from one autoencoder, got {tuple(first.shape)} and {tuple(second.shape)}; "
            "encode the pictures with the same VAE"
        )
    if first.shape[2:] != second.shape[2:]:
        height, width = first.shape[-2:]
        context.warn(
            f"latents of {second.shape[-1]}×{second.shape[-2]} were scaled to {width}×{height} to fit the batch; use "
            "Create List to train each at its own size"
        )
        flat = resized(second.flatten(1, -3), width, height, method="bilinear", crop=True)
        second = flat.reshape(*second.shape[:-2], height, width)
    return ({**samples1, "samples": torch.cat((first, second))},)


@node("RepeatLatentBatch", "Repeat Latent Batch", "model/latent/batch", outputs=["LATENT"])
def repeat_latent_batch(
    context: NodeContext, *, samples: Latent = socket("LATENT"), amount: int = socket("INT", default=1, min=1, max=64)
) -> tuple[Latent]:
    """Repeat a batch."""
    return ({**samples, "samples": torch.cat([samples["samples"]] * amount)},)


@node(
    "RebatchLatents",
    "Rebatch Latents",
    "model/latent/batch",
    outputs=[Output("LATENT", is_list=True)],
    is_input_list=True,
)
def rebatch_latents(
    context: NodeContext,
    *,
    latents: list[Latent] = socket("LATENT"),
    batch_size: list[int] = socket("INT", default=1, min=1, max=4096, tooltip="Latents in a batch, at most."),
) -> tuple[list[Latent]]:
    """Join and split batches to a size, in order; where the shape changes, a smaller batch ends."""
    size = single(context, "batch_size", batch_size)
    runs = [list(run) for _, run in itertools.groupby(flat_latents(latents), key=lambda latent: latent.shape)]
    scales = {latent.get("downscale_ratio_spacial") for latent in latents}
    # Pixels per latent are those of empty latents, and of a whole list or none.
    scale = scales.pop() if len(scales) == 1 else None
    batches = [torch.cat(run[start : start + size]) for run in runs for start in range(0, len(run), size)]
    return ([latent_of(batch, scale) for batch in batches],)
