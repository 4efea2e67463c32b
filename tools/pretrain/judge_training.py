"""Trains the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.core.folders import BUILT_IN_JUDGE
from lorasmith.evaluation.wishes import BACKGROUNDS
from tools.pretrain.data import HELD_OUT_STYLE, HELD_OUT_SUBJECTS, ICON_SIZES, Icons
from tools.pretrain.judge import SETS, SUBJECTS, Judge
from tools.pretrain.loop import step_random

BATCH = 64
POOL = 8192  # pictures, half of them through the autoencoder, that the batches are drawn from
STEPS = 1500
STYLE_POOL, STYLE_STEPS = 15360, 2900

Row = tuple[int, str, str]  # of a drawing: its row, set and concept


def train_judge(work: Path, autoencoder: AutoencoderKL) -> tuple[float, float]:
    """Train and save the judge; returns the accuracy of subjects and of styles on drawings at a place, size and
    background that it did not see.

    Styles are learnt from all concepts, and as often from the held-out subjects, whose drawings are what is measured.
    """
    icons = Icons(work)
    torch.manual_seed(0)
    judge = Judge().train()
    known = [(icons.row(s, c), s, c) for c in SUBJECTS for s in SETS if icons.has(s, c)]
    every = [(row, one.icon_set, one.concept) for row, one in enumerate(icons.icons)]
    by_style = [
        [row for row in every if row[1] == icon_set and (row[2] in HELD_OUT_SUBJECTS) == is_held_out]
        for icon_set in SETS
        for is_held_out in (False, True)
    ]
    found = []
    for name, scores, parts, rows, size, steps in (
        ("judge", judge.subject_scores, (judge.features, judge.hidden, judge.subject), [known], POOL, STEPS),
        ("style", judge.style_scores, (judge.style_features, judge.style), by_style, STYLE_POOL, STYLE_STEPS),
    ):
        pictures, labels = _pool(icons, rows, autoencoder, size, seed=0)
        column = int(name == "style")
        weights = [weight for part in parts for weight in part.parameters()]
        _train(name, scores, weights, pictures, labels[:, column], steps)
        for part in parts:
            part.eval()
        unseen, truth = _pool(icons, rows, autoencoder, 1024, seed=1)
        with torch.no_grad():
            answers = scores(unseen.float() / 127.5 - 1).argmax(1)
        found.append(float((answers == truth[:, column]).float().mean()))
    save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, BUILT_IN_JUDGE)
    return found[0], found[1]


def _train(
    name: str,
    scores: Callable[[Tensor], Tensor],
    weights: Sequence[nn.Parameter],
    pictures: Tensor,
    labels: Tensor,
    steps: int,
) -> None:
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    for step in range(steps):
        random = np.random.default_rng(step_random(name, step))
        picked = torch.from_numpy(random.integers(0, len(pictures), BATCH))
        batch = pictures[picked].float() / 127.5 - 1
        # Model pictures are a little softer, and off in colour.
        batch = batch * (1 + 0.15 * torch.from_numpy(random.standard_normal((BATCH, 1, 1, 1), np.float32)))
        batch = batch + 0.1 * torch.from_numpy(random.standard_normal((BATCH, 3, 1, 1), np.float32))
        batch = torch.roll(batch, tuple(int(n) for n in random.integers(-3, 4, 2)), (2, 3))
        loss = smooth(scores(batch), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"{name}, step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def _pool(
    icons: Icons, rows: Sequence[Sequence[Row]], autoencoder: AutoencoderKL, size: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Pictures (size, 3, 64, 64) uint8, of each of `rows` as many, and labels (size, 2): subject or −1, style."""
    random = np.random.default_rng(seed)
    pictures, labels = [], []
    for _ in range(size):
        some = rows[random.integers(len(rows))]
        row, icon_set, concept = some[random.integers(len(some))]
        plain = icon_set == HELD_OUT_STYLE or random.random() < 0.5
        ground = "white" if plain else str(random.choice(list(BACKGROUNDS)))
        shift = tuple(int(n) for n in random.integers(-3, 4, 2))
        pictures.append(icons.picture(row, ground, size=int(random.choice(ICON_SIZES)), shift=shift))
        labels.append((SUBJECTS.index(concept) if concept in SUBJECTS else -1, SETS.index(icon_set)))
    stacked = torch.stack(pictures)
    with torch.no_grad():
        for start in range(0, size // 2, 64):
            part = slice(start, min(start + 64, size // 2))
            stacked[part] = autoencoder.decode(autoencoder.encode(stacked[part]).latent_dist.mean).sample.clamp(-1, 1)
    return ((stacked + 1) * 127.5).round().to(torch.uint8), torch.tensor(labels)
