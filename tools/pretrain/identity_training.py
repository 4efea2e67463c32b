"""Trains the judge of `benchmarks/quality`, on all drawings but those of the subjects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.quality.identity import CANDIDATES, FILE, STYLED, WIDTH, Identity
from benchmarks.quality.subjects import TRAINED_BACKGROUNDS, TRAINED_SETS, drawing, sets_of
from lorasmith.evaluation.judge import tensors
from lorasmith.evaluation.wishes import BACKGROUNDS
from tools.pretrain.data import (
    CONCEPTS,
    FXEMOJI,
    HELD_OUT_STYLE,
    ICON_SIZES,
    OTHER_SETS,
    UNTAUGHT,
    Icon,
    Icons,
    render_icons,
)
from tools.pretrain.loop import autocast, step_random
from tools.pretrain.subjects import DEVELOPMENT, TEST

BATCH = 64
VIEWS = 3  # of each drawing, that the batches are drawn from
STEPS, STYLE_STEPS = 1500, 1200
MARGIN = 0.15  # of cosines: Wang et al. 2018, arXiv:1801.09414
_KINDRED = {"tiger", "cow", "mouse", "whale", "chicken", "japanese castle", "fortune cookie"}
"""What is drawn almost as a subject is, and so left out with it."""
_LIKE_ONE_ANOTHER = ("o’clock", "-thirty")  # faces of clocks
_CPU = torch.device("cpu")
_GREY = 0.15  # share of pictures without colour


def train_identity(node_modules: Path, work: Path, autoencoder: AutoencoderKL) -> None:
    """Train and save the judge; `benchmarks.quality.validation` measures it."""
    if not (work / FXEMOJI / "icons.json").exists():
        render_icons(node_modules, work / FXEMOJI, (FXEMOJI,))
    icons = Icons(work)
    pictures, concepts, styles = _pool((icons, Icons(work / FXEMOJI)), autoencoder)
    torch.manual_seed(0)
    judge = Identity().train().to(memory_format=torch.channels_last)

    of_trained_sets = np.flatnonzero(np.isin(styles, [STYLED.index(one) for one in (*TRAINED_SETS, HELD_OUT_STYLE)]))
    names, numbers = np.unique(concepts[of_trained_sets], return_inverse=True)
    truth = np.full(len(concepts), -1)
    truth[of_trained_sets] = numbers
    proxies = nn.Parameter(torch.randn(len(names), WIDTH))
    optimizer = _optimizer([*judge.features.parameters(), *judge.embedding.parameters()])
    optimizer.add_param_group({"params": [proxies], "lr": 2e-2, "weight_decay": 0.0})
    for random, picked, batch in _steps("identity", pictures, [of_trained_sets], STEPS, optimizer):
        labels = torch.from_numpy(truth[picked])
        with autocast(_CPU):
            embedded = judge.embedded(_turned(batch, random))
        cosines = embedded @ F.normalize(proxies, dim=1).T - MARGIN * F.one_hot(labels, len(names))
        F.cross_entropy(16 * cosines, labels, label_smoothing=0.05).backward()

    by_style = [np.flatnonzero(styles == place) for place in range(len(STYLED))]
    optimizer = _optimizer([*judge.style_features.parameters(), *judge.style.parameters()])
    for _, picked, batch in _steps("styles", pictures, by_style, STYLE_STEPS, optimizer):
        with autocast(_CPU):
            scores = judge.style_scores(batch)
        F.cross_entropy(scores, torch.from_numpy(styles[picked]), label_smoothing=0.1).backward()

    judge.eval()
    with torch.no_grad():
        judge.prototypes.copy_(torch.stack([_prototype(judge, icons, one) for one in CANDIDATES]))
        judge.scale.copy_(_best_scale(judge, icons, autoencoder))
    print(f"scale {judge.scale.item():.1f}")
    save_file({name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}, FILE)


def is_taught(icon: Icon) -> bool:
    """Whether the judge is trained on a drawing: on none of the subjects or UNTAUGHT, and no signs or clocks."""
    left_out = icon.concept in {*DEVELOPMENT, *TEST, *_KINDRED, *UNTAUGHT}
    return not left_out and icon.group != "symbols" and not icon.concept.endswith(_LIKE_ONE_ANOTHER)


def _pool(sources: Sequence[Icons], autoencoder: AutoencoderKL) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Pictures (N, 3, 64, 64) uint8, half of them through the autoencoder; concept and style of each."""
    random = np.random.default_rng(0)
    drawn = [(icons, row, icon) for icons in sources for row, icon in enumerate(icons.icons) if is_taught(icon)]
    pieces, concepts, styles = [], [], []
    for places in np.array_split(np.concatenate([random.permutation(len(drawn)) for _ in range(VIEWS)]), 300):
        some = []
        for icons, row, icon in (drawn[place] for place in places):
            plain = icon.icon_set == HELD_OUT_STYLE or random.random() < 0.4
            ground = "white" if plain else str(random.choice(list(BACKGROUNDS)))
            shift = tuple(int(n) for n in random.integers(-3, 4, 2))
            some.append(icons.picture(row, ground, size=int(random.choice(ICON_SIZES)), shift=shift))
            concepts.append(icon.concept)
            styles.append(STYLED.index(icon.icon_set))
        stacked = torch.stack(some)
        pieces.append(_bytes(stacked if len(pieces) % 2 else _passed(stacked, autoencoder)))
    return torch.cat(pieces), np.array(concepts), np.array(styles)


def _passed(pictures: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    with torch.no_grad(), autocast(_CPU):
        decoded: Tensor = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mean).sample
    return decoded.float().clamp(-1, 1)


def _bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


def _optimizer(weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.05)


def _steps(
    name: str, pictures: Tensor, groups: Sequence[np.ndarray], steps: int, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[np.random.Generator, np.ndarray, Tensor]]:
    """The generator, places and pictures of each batch, of each group as many; updates after what is done with it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        random = np.random.default_rng(step_random(name, step))
        picked = np.array([random.choice(groups[place % len(groups)]) for place in range(BATCH)])
        batch = pictures[torch.from_numpy(picked)].float() / 127.5 - 1
        # Model pictures are a little softer, and off in colour.
        batch = batch * (1 + 0.15 * torch.from_numpy(random.standard_normal((BATCH, 1, 1, 1), np.float32)))
        batch = batch + 0.1 * torch.from_numpy(random.standard_normal((BATCH, 3, 1, 1), np.float32))
        yield random, picked, batch.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"{name}, step {step} of {steps}", flush=True)


def _turned(batch: Tensor, random: np.random.Generator) -> Tensor:
    """Pictures as another designer might draw them: turned, stretched, mirrored, in other colours or in none."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32))

    def chosen(share: float) -> Tensor:
        return torch.from_numpy(random.random((BATCH, 1, 1)) < share)

    batch = torch.where(chosen(_GREY)[..., None], batch.mean(1, keepdim=True), batch)
    batch = torch.einsum("bij,bjhw->bihw", torch.eye(3) + 0.15 * normal(BATCH, 3, 3), batch)
    matrix = torch.eye(2) + 0.1 * normal(BATCH, 2, 2)
    matrix[..., :1] = torch.where(chosen(0.5), -matrix[..., :1], matrix[..., :1])
    affine = torch.cat((matrix, 0.05 * normal(BATCH, 2, 1)), 2)
    grid = F.affine_grid(affine, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def _prototype(judge: Identity, icons: Icons, candidate: str) -> Tensor:
    """The mean of what the held-out designers draw."""
    known = OTHER_SETS if candidate in CONCEPTS else sets_of(candidate)
    held_out = [one for one in known if one not in TRAINED_SETS]
    return judge.prototype(
        _drawings([(candidate, one, where) for one in held_out for where in TRAINED_BACKGROUNDS], icons)
    )


def _drawings(drawn: Sequence[tuple[str, str, str]], icons: Icons) -> Tensor:
    """Pictures of candidates, each by a set before a background."""
    return torch.cat(
        [
            icons.picture(icons.row(icon_set, one), where)[None]
            if one in CONCEPTS
            else tensors([drawing(one, icon_set, where)])
            for one, icon_set, where in drawn
        ]
    )


def _best_scale(judge: Identity, icons: Icons, autoencoder: AutoencoderKL) -> Tensor:
    """The scale at which drawings of known concepts and development subjects are likeliest."""
    grounds = itertools.cycle(BACKGROUNDS)
    drawn = [(one, icon_set, next(grounds)) for one in (*CONCEPTS, *DEVELOPMENT) for icon_set in TRAINED_SETS]
    scores = judge.subject_scores(_passed(_drawings(drawn, icons), autoencoder)) / judge.scale
    truth = torch.tensor([CANDIDATES.index(one) for one, *_ in drawn])
    return min(torch.arange(8.0, 101.0, 2.0), key=lambda scale: float(F.cross_entropy(scale * scores, truth)))
