"""The UNet: Stable Diffusion 1.x's layout in small, v-prediction, trained on cached latents with a frozen text encoder.

It looks at the text at every resolution but the lowest: with attention at the lowest only, captions take four times
as many samples to matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.schedule import DiscreteSchedule
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.batches import Batch
from tools.pretrain.autoencoder import fold_statistics
from tools.pretrain.data import CONCEPTS, ICON_SIZES, Icons, caption
from tools.pretrain.loop import Run, autocast, step_random
from tools.pretrain.optimizer import optimizers_for
from tools.pretrain.text_encoder import SHORT, encode

BATCH = 32
WHITE_VARIANTS = 6
UNCAPTIONED = 0.1  # share of samples without a caption, for classifier-free guidance


@dataclass(frozen=True)
class Latents:
    """Encoded pictures.

    Attributes:
        values: (N, 4, 16, 16) fp16, scaled as the UNet sees them.
        labels: concept, icon set and background of each.
    """

    values: Tensor
    labels: list[tuple[str, str, str]]

    @classmethod
    def load(cls, folder: Path) -> Latents:
        """What `encode_pictures` wrote."""
        labels = [tuple(label) for label in json.loads((folder / "latents.json").read_text("utf-8"))]
        return cls(torch.from_numpy(np.load(folder / "latents.npy")), labels)


def build() -> UNet2DConditionModel:
    """8.8 million parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # of this class: the number of heads
        norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def encode_pictures(work: Path, autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Cache the latents of every concept in every style, on each background, a little moved; and fold their statistics.

    Returns:
        The autoencoder, changed in place so that its latents are what was cached.
    """
    icons, random = Icons(work), np.random.default_rng(0)
    grounds = ["white"] * WHITE_VARIANTS + [name for name in BACKGROUNDS if name != "white"]
    labels, pieces = [], []
    for concept in CONCEPTS:
        for icon_set in STYLES:
            row = icons.row(icon_set, concept)
            pictures = [icons.picture(row)]
            for ground in grounds[1:]:
                shift = tuple(int(n) for n in random.integers(-2, 3, 2))
                size = int(random.choice(ICON_SIZES[:2], p=[2 / 3, 1 / 3]))
                pictures.append(icons.picture(row, ground, size=size, shift=shift))
            with torch.no_grad():
                pieces.append(autoencoder.encode(torch.stack(pictures)).latent_dist.mean)
            labels += [(concept, icon_set, ground) for ground in grounds]
    values = fold_statistics(autoencoder, torch.cat(pieces))
    np.save(work / "latents.npy", values.half().numpy())
    (work / "latents.json").write_text(json.dumps(labels), "utf-8")
    return autoencoder


def train_unet(
    work: Path,
    text_encoder: CLIPTextModel,
    steps: int,
    device: torch.device,
    *,
    start: UNet2DConditionModel | None = None,
    show: Callable[[UNet2DConditionModel, int], None] | None = None,
) -> UNet2DConditionModel:
    """Train until `steps` updates; returns the averaged model.

    Args:
        work: folder with latents and this stage's state.
        text_encoder: frozen.
        steps: updates in all.
        device: where to train.
        start: weights to begin with, if this stage has no state yet.
        show: called with the averaged model and the step after each save.
    """
    data = Latents.load(work)
    schedule = DiscreteSchedule.scaled_linear()
    text_encoder = text_encoder.to(device).eval().requires_grad_(False)
    model = (start or build()).train().to(device)
    run = Run(
        model,
        optimizers_for(model, lr=2e-3, weight_decay=1e-2),
        state=work / "unet" / "state.pt",
        ema=0.998,
    )

    def loss_at(step: int) -> Tensor:
        random = np.random.default_rng(step_random("unet", step))
        captions, clean = captions_of(data, random)
        clean = clean.to(device)
        noise = torch.from_numpy(random.standard_normal(clean.shape, np.float32)).to(device)
        level = schedule.at(_times(random)).to(device)
        noised = level.noised(clean, noise)
        with autocast(device):
            context = text_encoder(encode(captions, SHORT).to(device)).last_hidden_state
            prediction = model(noised, level.time, context).sample
        batch = Batch(clean, noise, noised, level, Conditioning({"context": context}), names=tuple(captions))
        return diffusion_loss(prediction, batch, parameterization="v", objective="native", loss_function="MSE").mean()

    run.until(steps, loss_at, every=None if show is None else lambda: show(run.average, run.step))
    return run.average.cpu()


def captions_of(data: Latents, random: np.random.Generator) -> tuple[list[str], Tensor]:
    """A batch: captions, and latents in fp32."""
    picked = random.integers(0, len(data.labels), BATCH)
    captions = ["" if random.random() < UNCAPTIONED else caption(*data.labels[index], random) for index in picked]
    return captions, data.values[torch.from_numpy(picked)].float()


def _times(random: np.random.Generator) -> Tensor:
    """Quantiles of diffusion time (BATCH,), one in each of as many equal slices; two thirds lie in the noisier half."""
    slices = (np.arange(BATCH) + random.random(BATCH)) / BATCH
    noisier = random.random(BATCH) < 0.65
    return torch.from_numpy(np.where(noisier, 0.5 + slices / 2, slices).astype(np.float32))
