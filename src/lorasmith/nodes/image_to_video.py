"""Nodes that give models of clips their first and last frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import placed_for_products
from lorasmith.core.errors import DataError
from lorasmith.core.placement import best_device
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import CLIP_VISION, Conditioning
from lorasmith.families.model import Autoencoder
from lorasmith.families.part_loading import load_image_encoder
from lorasmith.families.parts.clip_vision import picture_states
from lorasmith.nodes.images import resized
from lorasmith.nodes.values import CONCAT_IMAGE, CONCAT_MASK, Latent, check_pixels, latent_of
from lorasmith.workflow import NodeContext, Output, node, socket

_CONDITIONED = [Output("CONDITIONING", "positive"), Output("CONDITIONING", "negative"), Output("LATENT", "latent")]


@node("CLIPVisionLoader", "Load CLIP Vision", "model/loaders", outputs=["CLIP_VISION"])
def clip_vision_loader(
    context: NodeContext,
    *,
    clip_name: str = socket(
        "COMBO",
        options=lambda folders: folders.files("clip_vision"),
        file=lambda folders, name: folders.find("clip_vision", name),
        tooltip="A file in models/clip_vision.",
    ),
) -> tuple[nn.Module]:
    """Load an image encoder."""
    return (load_image_encoder(context.folders.find("clip_vision", clip_name)),)


@node("CLIPVisionEncode", "CLIP Vision Encode", "model/conditioning", outputs=["CLIP_VISION_OUTPUT"])
def clip_vision_encode(
    context: NodeContext,
    *,
    clip_vision: nn.Module = socket("CLIP_VISION"),
    image: Tensor = socket("IMAGE"),
    crop: str = socket(
        "COMBO",
        options=("center", "none"),
        tooltip="Of pictures that are not square; none squashes them, as Wan was trained.",
    ),
) -> tuple[Tensor]:
    """Encode a picture for models that see it beside the prompt."""
    pixels = image[..., :3].movedim(-1, 1) * 2 - 1
    with placed_for_products(clip_vision, device=best_device(), dtype=torch.float32):
        return (picture_states(clip_vision, pixels, crop=crop == "center").cpu(),)


def _side(default: int, step: int) -> Any:
    return socket("INT", default=default, min=step, max=16384, step=step, tooltip="In pixels.")


def _length(default: int) -> Any:
    return socket("INT", default=default, min=1, max=16384, step=4, tooltip="Frames: 5, 9, 13, ...")


def _states(tooltip: str = "Of the first frame, for Wan 2.1.") -> Any:
    return socket("CLIP_VISION_OUTPUT", optional=True, tooltip=tooltip)


_BATCH_SIZE = socket("INT", default=1, min=1, max=4096, tooltip="Number of clips.")
_START = socket("IMAGE", optional=True, tooltip="The first frame; a batch is the first frames.")


@node("WanImageToVideo", "WanImageToVideo", "model/conditioning/wan", outputs=_CONDITIONED)
def wan_image_to_video(
    context: NodeContext,
    *,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    vae: Autoencoder = socket("VAE"),
    width: int = _side(832, 16),
    height: int = _side(480, 16),
    length: int = _length(81),
    batch_size: int = _BATCH_SIZE,
    clip_vision_output: Tensor | None = _states(),
    start_image: Tensor | None = _START,
) -> tuple[list[Conditioning], list[Conditioning], Latent]:
    """Give Wan's image to video the first frame of a clip, and make empty latents for it."""
    tensors = {} if clip_vision_output is None else {CLIP_VISION: clip_vision_output}
    if start_image is not None:
        tensors |= _known(vae, width, height, length, start=start_image)
        tensors[CONCAT_MASK] = tensors[CONCAT_MASK].amax(1, keepdim=True)  # for whole latents here
    return _given(positive, negative, tensors, _empty(vae, width, height, length, batch_size))


@node("WanFirstLastFrameToVideo", "WanFirstLastFrameToVideo", "model/conditioning/wan", outputs=_CONDITIONED)
def wan_first_last_frame_to_video(
    context: NodeContext,
    *,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    vae: Autoencoder = socket("VAE"),
    width: int = _side(832, 16),
    height: int = _side(480, 16),
    length: int = _length(81),
    batch_size: int = _BATCH_SIZE,
    clip_vision_start_image: Tensor | None = _states(),
    clip_vision_end_image: Tensor | None = _states("Of the last frame, for Wan 2.1."),
    start_image: Tensor | None = _START,
    end_image: Tensor | None = socket("IMAGE", optional=True, tooltip="The last frame; a batch is the last frames."),
) -> tuple[list[Conditioning], list[Conditioning], Latent]:
    """Give Wan's image to video the first and last frame of a clip, and make empty latents for it."""
    tensors = _known(vae, width, height, length, start=start_image, end=end_image)
    states = [output for output in (clip_vision_start_image, clip_vision_end_image) if output is not None]
    if states:
        tensors[CLIP_VISION] = torch.cat(states, dim=1)
    return _given(positive, negative, tensors, _empty(vae, width, height, length, batch_size))


@node("Wan22ImageToVideoLatent", "Wan22ImageToVideoLatent", "model/conditioning/wan", outputs=["LATENT"])
def wan22_image_to_video_latent(
    context: NodeContext,
    *,
    vae: Autoencoder = socket("VAE"),
    width: int = _side(1280, 32),
    height: int = _side(704, 32),
    length: int = _length(49),
    batch_size: int = _BATCH_SIZE,
    start_image: Tensor | None = _START,
) -> tuple[Latent]:
    """Make latents of a clip for Wan 2.2 5B, empty but for the first frame, which is kept."""
    empty = _empty(vae, width, height, length, 1)
    if start_image is None:
        return (empty,)
    with vae.active():
        first = vae.encode(_frames(start_image[:length], width, height))
    slot = FAMILIES["wan22-5b"].autoencoder
    samples, count = slot.latents(slot.channels).from_model(empty["samples"]), first.shape[2]
    samples[:, :, :count] = first
    mask = torch.ones(1, 1, *samples.shape[2:])
    mask[:, :, :count] = 0
    repeats = (batch_size, 1, 1, 1, 1)
    return (latent_of(samples.repeat(repeats), mask=mask.repeat(repeats)),)


@node(
    "HunyuanVideo15ImageToVideo", "HunyuanVideo15ImageToVideo", "model/conditioning/hunyuan video", outputs=_CONDITIONED
)
def hunyuan_video15_image_to_video(
    context: NodeContext,
    *,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    vae: Autoencoder = socket("VAE"),
    width: int = _side(848, 16),
    height: int = _side(480, 16),
    length: int = _length(33),
    batch_size: int = _BATCH_SIZE,
    start_image: Tensor | None = _START,
    clip_vision_output: Tensor | None = _states("Of the first frame."),
) -> tuple[list[Conditioning], list[Conditioning], Latent]:
    """Give HunyuanVideo 1.5 the first frame of a clip, and make empty latents for it."""
    tensors = {} if clip_vision_output is None else {CLIP_VISION: clip_vision_output}
    empty = _empty(vae, width, height, length, batch_size)
    if start_image is not None:
        frames = _frames(start_image[:length], width, height)
        with vae.active():
            first = vae.encode(frames[:, :, : vae.latent.whole_frames(frames.shape[2])])
        image, mask = torch.zeros_like(empty["samples"][:1]), torch.ones_like(empty["samples"][:1, :1])
        image[:, :, : first.shape[2]], mask[:, :, : first.shape[2]] = first, 0
        tensors |= {CONCAT_IMAGE: image, CONCAT_MASK: mask}
    return _given(positive, negative, tensors, empty)


def _known(
    vae: Autoencoder, width: int, height: int, length: int, *, start: Tensor | None, end: Tensor | None = None
) -> dict[str, Tensor]:
    """ComfyUI's tensors of a clip that is grey but for its first and last frames; its mask is 1 where it is grey."""
    check_pixels(length, width, height)
    times = _empty(vae, width, height, length, 1)["samples"].shape[2:]
    clip, by_frame = torch.zeros(1, 3, length, height, width), torch.ones(4 * times[0])
    if start is not None:
        frames = _frames(start[:length], width, height)
        clip[:, :, : frames.shape[2]] = frames
        by_frame[: frames.shape[2] + 3] = 0
    if end is not None:
        frames = _frames(end[-length:], width, height)
        clip[:, :, -frames.shape[2] :] = frames
        by_frame[-frames.shape[2] :] = 0
    with vae.active():
        latents = vae.encode(clip)
    mask = by_frame.reshape(1, -1, 4).transpose(1, 2)[..., None, None].expand(-1, -1, -1, *times[1:]).contiguous()
    return {CONCAT_IMAGE: latents, CONCAT_MASK: mask}


def _frames(image: Tensor, width: int, height: int) -> Tensor:
    """IMAGE as a clip (1, 3, frames, height, width) in [−1, 1] of this size."""
    scaled = resized(image[..., :3].movedim(-1, 1), width, height, method="bilinear", crop=True)
    return scaled.movedim(0, 1).unsqueeze(0) * 2 - 1


def _empty(vae: Autoencoder, width: int, height: int, length: int, batch_size: int) -> Latent:
    form = vae.latent
    if not form.time_downscale:
        raise DataError(f"this node needs the VAE of a model of videos, but {vae.title} is of pictures; load Wan's")
    return {"samples": torch.zeros(batch_size, *form.shape(height, width, length))}


def _given(
    positive: Sequence[Conditioning], negative: Sequence[Conditioning], tensors: dict[str, Tensor], latent: Latent
) -> tuple[list[Conditioning], list[Conditioning], Latent]:
    sides = [[replace(entry, tensors={**entry.tensors, **tensors}) for entry in side] for side in (positive, negative)]
    return sides[0], sides[1], latent
