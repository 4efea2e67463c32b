"""Nodes for latents: encode, decode, batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.model import Autoencoder
from lorasmith.nodes.images import resized
from lorasmith.nodes.values import Latent, check_latents, image_from_pixels, pixels_from_image
from lorasmith.workflow import Input, NodeContext, Output, node

__all__: list[str] = []


@node(
    "VAEEncode",
    display_name="VAE Encode",
    category="model/latent",
    inputs=[Input("pixels", "IMAGE"), Input("vae", "VAE")],
    outputs=[Output("LATENT")],
)
def vae_encode(context: NodeContext, *, pixels: Tensor, vae: Autoencoder) -> tuple[Latent]:
    """Encode pictures into latents; edges are cropped to whole latents."""
    with vae.active():
        return ({"samples": vae.encode(pixels_from_image(pixels, vae))},)


@node(
    "VAEDecode",
    display_name="VAE Decode",
    category="model/latent",
    inputs=[Input("samples", "LATENT"), Input("vae", "VAE")],
    outputs=[Output("IMAGE")],
)
def vae_decode(context: NodeContext, *, samples: Latent, vae: Autoencoder) -> tuple[Tensor]:
    """Decode latents into pictures."""
    check_latents(samples["samples"], vae.latent)
    with vae.active():
        return (image_from_pixels(vae.decode(samples["samples"])),)


@node(
    "EmptyLatentImage",
    display_name="Empty Latent Image",
    category="model/latent",
    inputs=[
        Input("width", "INT", default=512, min=16, max=16384, step=8, tooltip="In pixels."),
        Input("height", "INT", default=512, min=16, max=16384, step=8, tooltip="In pixels."),
        Input("batch_size", "INT", default=1, min=1, max=4096, tooltip="Number of pictures."),
    ],
    outputs=[Output("LATENT")],
)
def empty_latent_image(context: NodeContext, *, width: int, height: int, batch_size: int) -> tuple[Latent]:
    """Empty latents for new pictures; KSampler adapts their shape to its model."""
    return ({"samples": torch.zeros(batch_size, 4, height // 8, width // 8), "downscale_ratio_spacial": 8},)


@node(
    "LatentBatch",
    display_name="Batch Latents (DEPRECATED)",
    category="model/latent/batch",
    inputs=[Input("samples1", "LATENT"), Input("samples2", "LATENT")],
    outputs=[Output("LATENT")],
    deprecated=True,
)
def latent_batch(context: NodeContext, *, samples1: Latent, samples2: Latent) -> tuple[Latent]:
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


@node(
    "RepeatLatentBatch",
    display_name="Repeat Latent Batch",
    category="model/latent/batch",
    inputs=[Input("samples", "LATENT"), Input("amount", "INT", default=1, min=1, max=64)],
    outputs=[Output("LATENT")],
)
def repeat_latent_batch(context: NodeContext, *, samples: Latent, amount: int) -> tuple[Latent]:
    """Repeat a batch."""
    return ({**samples, "samples": torch.cat([samples["samples"]] * amount)},)
