"""The autoencoder: 64×64 pixels to 4×16×16 latents and back, in diffusers' AutoencoderKL.

The loss compares pixels (L1 and squares), edges (L1 of finite differences) and, on 4×4 blocks, colour: without the
last all four channels encode brightness, and red and green look the same. After training the latents' mean and
spread are folded into the 1×1 convolutions around them, so that Stable Diffusion's own scaling factor gives unit
variance.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lorasmith.evaluation.wishes import BACKGROUNDS
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.sampling.generate import to_images
from tools.pretrain.data import HELD_OUT_STYLE, ICON_SIZES, Icons, on_background
from tools.pretrain.loop import Run, autocast, step_random
from tools.pretrain.optimizer import optimizers_for

SCALING_FACTOR = 0.18215  # Stable Diffusion 1.x's own
KL_WEIGHT = 1e-3
BATCH = 8


def build() -> AutoencoderKL:
    """Eight channels per group: with one, norms would remove flat colours."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    )


def train_autoencoder(work: Path, steps: int, device: torch.device) -> AutoencoderKL:
    """Train until `steps` updates; returns the averaged model, in `work/autoencoder`'s state as well."""
    icons = Icons(work)
    rows = np.array([row for row, icon in enumerate(icons.icons) if icon.icon_set != HELD_OUT_STYLE])
    concepts = sorted({icon.concept for icon in icons.icons})
    kept_back = set(concepts[::50])  # in no style seen by the autoencoder: what the error is measured on
    seen = np.array([row for row in rows if icons.icons[row].concept not in kept_back])
    unseen = torch.stack([icons.picture(row) for row in rows if icons.icons[row].concept in kept_back]).to(device)

    model = build().to(device, memory_format=torch.channels_last)
    run = Run(
        model,
        optimizers_for(model, lr=2e-3, weight_decay=0.0),
        state=work / "autoencoder" / "state.pt",
        ema=0.998,
    )

    def loss_at(step: int) -> Tensor:
        random = np.random.default_rng(step_random("autoencoder", step))
        pictures = _batch(icons, seen, random).to(device)
        noise = torch.from_numpy(random.standard_normal((BATCH, 4, 16, 16), np.float32)).to(device)
        with autocast(device):
            latents = model.encode(pictures).latent_dist
            decoded = model.decode(latents.mean + latents.std * noise).sample
        return reconstruction_loss(decoded.float(), pictures) + KL_WEIGHT * _kl(latents.mean, latents.logvar)

    def show() -> None:
        with torch.no_grad(), autocast(device):
            decoded = run.average.decode(run.average.encode(unseen).latent_dist.mean).sample.float()
        print(f"unseen concepts: {psnr(decoded, unseen):.2f} dB", flush=True)
        rows = [to_images(pictures[::7][:16]) for pictures in (unseen, decoded)]
        contact_sheet(rows, ["drawn", "decoded"], ()).save(work / "autoencoder" / f"step-{run.step:06d}.png")

    run.until(steps, loss_at, every=show)
    return run.average.cpu().to(memory_format=torch.contiguous_format)


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Scalar, from (batch, 3, h, w) in [−1, 1]."""
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    blocks = F.avg_pool2d(error, 4)
    red, green, blue = blocks.unbind(1)
    chroma = torch.stack([red - green, blue - (red + green) / 2], 1)
    colour = blocks.abs().mean() + 2 * chroma.abs().mean() + 2 * chroma.square().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + colour


def psnr(decoded: Tensor, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [−1, 1]."""
    return -10 * math.log10(F.mse_loss(decoded.clamp(-1, 1), pictures).item() / 4)


def fold_statistics(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Rescale the model's latents so that `SCALING_FACTOR · encode(x)` has mean 0 and spread 1 in each channel.

    Args:
        model: changed in place; what it decodes stays the same.
        latents: (N, 4, h, w) unscaled latents of the pictures to be represented.

    Returns:
        The latents after the change, scaled as the UNet sees them.
    """
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = 1 / (SCALING_FACTOR * spread)
    into, out_of = model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        out_of.bias.add_(out_of.weight[:, :, 0, 0] @ mean)
        out_of.weight.div_(scale[None, :, None, None])
        into.weight[:4].mul_(scale[:, None, None, None])
        into.bias[:4].sub_(mean).mul_(scale)
        into.bias[4:].add_(2 * scale.log())
    return (latents - mean[:, None, None]) / spread[:, None, None]


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()


def _batch(icons: Icons, rows: np.ndarray, random: np.random.Generator) -> Tensor:
    """Icons on plain backgrounds, moved, mirrored, some of them grey, inverted or with colours exchanged."""
    pictures = []
    for row in random.choice(rows, BATCH):
        plane = icons.pixels[row, random.choice(len(ICON_SIZES), p=[0.5, 0.25, 0.25])]
        rgba = torch.from_numpy(plane.astype(np.float32)) / 255
        rgba = torch.roll(rgba, tuple(int(n) for n in random.integers(-3, 4, 2)), (1, 2))
        if random.random() < 0.5:
            rgba = rgba.flip(-1)
        named = np.array(list(BACKGROUNDS.values()), np.float32)[random.integers(len(BACKGROUNDS))] / 255
        colour = random.choice([np.ones(3, np.float32), named, random.random(3, np.float32)], p=[0.5, 0.25, 0.25])
        picture = on_background(rgba, torch.from_numpy(colour))
        change = random.random()
        if change < 0.1:
            picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
        elif change < 0.15:
            picture = 1 - picture
        elif change < 0.25:
            picture = picture[random.permutation(3)]
        pictures.append(picture)
    return torch.stack(pictures).clamp(0, 1) * 2 - 1
