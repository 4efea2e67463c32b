"""How good the model is, in numbers: what MODEL_CARD.md says comes from here.

concept score        share of pictures in which the judge sees the subject of the caption
style score          share of pictures whose style, among all sets, the judge finds to be the one the caption names
background score     share of pictures whose corners are nearest to the colour that the caption names
held-out-noise loss  v loss at noise that no training saw, the same for every model, by diffusion time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.random import keyed_normal
from lorasmith.data.dataset import Sample
from lorasmith.data.encoding import load_dataset
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.evaluation.judge import background_of
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.runs.library import train
from lorasmith.sampling.generate import generate
from lorasmith.training.batches import Batch
from tools.pretrain.data import CONCEPTS, UNTAUGHT, short_name, with_article
from tools.pretrain.judge import Judge, colourless

SEEDS = (1, 2, 3)
STYLE_FOLDER = BUILT_IN_BASE / "input" / "high-contrast"


@dataclass(frozen=True)
class Question:
    """A prompt and what its picture should show; style and background where the prompt names them."""

    prompt: str
    concept: str
    icon_set: str | None = None
    background: str | None = None


def questions() -> list[Question]:
    """One for each concept: a third plain, a third with a style, a third on a coloured background."""
    colours = [name for name in BACKGROUNDS if name != "white"]
    asked = []
    for index, concept in enumerate(CONCEPTS):
        noun = with_article(short_name(concept))
        if index % 3 == 0:
            asked.append(Question(noun, concept))
        elif index % 3 == 1:
            icon_set = list(STYLES)[index // 3 % len(STYLES)]
            asked.append(Question(f"{noun}, {STYLES[icon_set]}", concept, icon_set=icon_set))
        else:
            colour = colours[index // 3 % len(colours)]
            asked.append(Question(f"{noun}, on a {colour} background", concept, background=colour))
    return asked


def measure(name: str, grid: Path | None) -> None:
    """Print all numbers of one model as they come.

    Args:
        name: whatever `load_model` takes.
        grid: where the pictures of the sixty prompts go, or None.
    """
    model, judge = load_model(name), Judge.load()

    def say(what: str, value: float) -> None:
        print(f"{what:44}{value:8.3f}", flush=True)

    asked = questions()
    answers = [generate(model, [one.prompt for one in asked], seed=seed) for seed in SEEDS]
    for what, value in _judged(asked, answers, judge).items():
        say(what, value)
    if grid is not None:
        rows = [answers[0][start : start + 12] for start in range(0, len(asked), 12)]
        contact_sheet(rows, (), ()).save(grid)

    data = load_dataset(STYLE_FOLDER, model)
    for quarter, loss in held_out_noise_loss(model.denoiser, data.samples).items():
        say(f"loss on the held-out style, {quarter}", loss)
    result = train(model, data, steps=150, batch_size=8, rank=8, seed=1, validation_share=0.0)
    adapted = result.lora.applied_to(model.denoiser)
    for quarter, loss in held_out_noise_loss(adapted, data.samples).items():
        say(f"the same with a LoRA of 150 steps, {quarter}", loss)
    for row, denoiser in (("base", model.denoiser), ("LoRA", adapted)):
        pictures = [one for seed in SEEDS for one in generate(denoiser, [with_article(s) for s in UNTAUGHT], seed=seed)]
        seen = judge.subjects(pictures)
        say(
            f"{row}: concept score of untaught subjects",
            np.mean([a == b for a, b in zip(seen, UNTAUGHT * len(SEEDS), strict=True)]),
        )
        say(f"{row}: colourless pixels", colourless(pictures))


def held_out_noise_loss(denoiser: Denoiser, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean v loss over samples, at the middle of each quarter of diffusion time and in all."""
    schedule = denoiser.base.components.schedule
    means = {}
    with torch.no_grad(), denoiser.active():
        for quarter, quantile in (("cleanest", 0.125), ("second", 0.375), ("third", 0.625), ("noisiest", 0.875)):
            losses = []
            for index, sample in enumerate(samples):
                clean = sample.latents[None]
                noise = keyed_normal(tuple(clean.shape), 0, "held-out noise", f"{quarter}/{index}")
                level = schedule.at(torch.tensor([quantile]))
                noised = level.noised(clean, noise)
                losses.append(
                    diffusion_loss(
                        denoiser.predict(noised, level.time, sample.conditioning),
                        Batch(clean, noise, noised, level, sample.conditioning, (sample.name,)),
                        parameterization=denoiser.base.components.parameterization,
                        objective="native",
                        loss_function="MSE",
                    )
                )
            means[quarter] = torch.cat(losses).mean().item()
    return {**means, "mean": float(np.mean(list(means.values())))}


def _judged(asked: Sequence[Question], answers: Sequence[Sequence[Image.Image]], judge: Judge) -> dict[str, float]:
    """Scores over all rows of answers."""
    pictures = [picture for row in answers for picture in row]
    expected = list(asked) * len(answers)
    subjects, styles = judge.subjects(pictures), judge.styles(pictures)
    concept = [seen == one.concept for seen, one in zip(subjects, expected, strict=True)]
    style = [seen == one.icon_set for seen, one in zip(styles, expected, strict=True) if one.icon_set]
    ground = [
        background_of(picture) == one.background
        for picture, one in zip(pictures, expected, strict=True)
        if one.background
    ]
    return {"concept score": np.mean(concept), "style score": np.mean(style), "background score": np.mean(ground)}
