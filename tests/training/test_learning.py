"""A short run on the example pictures learns what they have in common, and it shows."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from lorasmith.core.folders import ASSETS
from lorasmith.data.loading import load_dataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.sampling.generate import generate
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.train import plan_job, recipe_of, train

SUBJECTS = ("a lion", "a red heart", "a cactus", "a light bulb")  # in none of the training pictures


def colourfulness(image: Image.Image) -> float:
    """Mean distance between a pixel's strongest and weakest channel, 0..255: the style has no colours."""
    pixels = np.asarray(image, dtype=np.float32)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


def held_out_loss(denoiser: Denoiser, samples: tuple[object, ...]) -> float:
    """Mean loss over the samples at noise that no run here has seen."""
    config = TrainConfig(batch_size=8, seed=987_654, training_dtype="fp32")
    recipe = recipe_of(plan_job(denoiser, config), torch.device("cpu"))
    maker = engine._batch_maker(denoiser, samples, recipe)  # type: ignore[arg-type]
    with torch.no_grad(), denoiser.active():
        losses = [engine.sample_losses(denoiser, batch, recipe) for step in range(8) for batch in maker.step(step)]
    return torch.cat(losses).mean().item()


def test_a_style_is_learnt_from_sixteen_pictures(tiny: Model) -> None:
    data = load_dataset(ASSETS / "input" / "high-contrast", tiny)
    assert len(data) == 16
    result = train(tiny, data, steps=60, batch_size=8, rank=8, seed=1)
    adapted = result.lora.applied_to(tiny.denoiser)
    base_loss, adapted_loss = (held_out_loss(one, data.samples) for one in (tiny.denoiser, adapted))
    assert adapted_loss < 0.6 * base_loss
    before, after = (
        np.mean([colourfulness(image) for image in generate(one, SUBJECTS, seed=1, steps=12)])
        for one in (tiny.denoiser, adapted)
    )
    assert after < 0.6 * before
