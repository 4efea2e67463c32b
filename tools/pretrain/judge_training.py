"""Trains the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.core.folders import BUILT_IN_JUDGE
from lorasmith.evaluation.wishes import BACKGROUNDS
from tools.pretrain.data import HELD_OUT_STYLE, ICON_SIZES, Icons
from tools.pretrain.judge import SETS, SUBJECTS, Judge
from tools.pretrain.loop import step_random

BATCH = 64
POOL = 8192  # pictures, half of them through the autoencoder, that the batches are drawn from


def train_judge(work: Path, autoencoder: AutoencoderKL, steps: int = 1500) -> float:
    """Train and save the judge; returns its accuracy on drawings at a place, size and background it did not see."""
    icons = Icons(work)
    rows = [(icons.row(s, c), s, c) for c in SUBJECTS for s in SETS if icons.has(s, c)]
    pictures, labels = _pool(icons, rows, autoencoder, POOL, seed=0)
    torch.manual_seed(0)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        random = np.random.default_rng(step_random("judge", step))
        picked = torch.from_numpy(random.integers(0, len(pictures), BATCH))
        batch = pictures[picked].float() / 127.5 - 1
        # Model pictures are a little softer, and off in colour.
        batch = batch * (1 + 0.15 * torch.from_numpy(random.standard_normal((BATCH, 1, 1, 1), np.float32)))
        batch = batch + 0.1 * torch.from_numpy(random.standard_normal((BATCH, 3, 1, 1), np.float32))
        batch = torch.roll(batch, tuple(int(n) for n in random.integers(-3, 4, 2)), (2, 3))
        loss = _loss(judge(batch), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    judge.eval()
    save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, BUILT_IN_JUDGE)
    unseen, truth = _pool(icons, rows, autoencoder, 1024, seed=1)
    with torch.no_grad():
        answers = judge(unseen.float() / 127.5 - 1)[0].argmax(1)
    return float((answers == truth[:, 0]).float().mean())


def _loss(answers: tuple[Tensor, Tensor], truth: Tensor) -> Tensor:
    subject, style = answers
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    total: Tensor = smooth(subject, truth[:, 0]) + F.cross_entropy(style, truth[:, 1])
    return total


def _pool(
    icons: Icons, rows: list[tuple[int, str, str]], autoencoder: AutoencoderKL, size: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Pictures (size, 3, 64, 64) uint8 and labels (size, 2): subject, style."""
    random = np.random.default_rng(seed)
    pictures, labels = [], []
    for _ in range(size):
        row, icon_set, concept = rows[random.integers(len(rows))]
        plain = icon_set == HELD_OUT_STYLE or random.random() < 0.5
        ground = "white" if plain else str(random.choice(list(BACKGROUNDS)))
        shift = tuple(int(n) for n in random.integers(-3, 4, 2))
        pictures.append(icons.picture(row, ground, size=int(random.choice(ICON_SIZES)), shift=shift))
        labels.append((SUBJECTS.index(concept), SETS.index(icon_set)))
    stacked = torch.stack(pictures)
    with torch.no_grad():
        for start in range(0, size // 2, 64):
            part = slice(start, min(start + 64, size // 2))
            stacked[part] = autoencoder.decode(autoencoder.encode(stacked[part]).latent_dist.mean).sample.clamp(-1, 1)
    return ((stacked + 1) * 127.5).round().to(torch.uint8), torch.tensor(labels)
