"""A short run on the example pictures learns what they have in common, and it shows."""

from __future__ import annotations

import pytest
import torch

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.library import train
from lorasmith.sampling.generate import generate
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from tools.pretrain.data import UNTAUGHT
from tools.pretrain.judge import Judge, colourless


def held_out_loss(denoiser: Denoiser, samples: tuple[object, ...]) -> float:
    """Mean loss over the samples at noise that no run here has seen."""
    config = TrainConfig(batch_size=8, seed=987_654, training_dtype="fp32")
    job = plan_job(denoiser, config, torch.device("cpu"))
    maker = engine.batch_maker(job.model, samples, job.config, job.way)  # type: ignore[arg-type]
    with torch.no_grad(), denoiser.active():
        batches = [batch for step in range(8) for batch in maker.step(step)]
        losses = [engine.sample_losses(job.model, batch, job.config, job.way) for batch in batches]
    return torch.cat(losses).mean().item()


@pytest.mark.slow
def test_a_style_is_learnt_from_sixteen_pictures(tiny: Model) -> None:
    data = load_dataset(BUILT_IN_BASE / "input" / "high-contrast", tiny)
    assert len(data) == 16
    result = train(tiny, data, steps=60, batch_size=8, rank=8, seed=1)
    adapted = result.lora.applied_to(tiny.denoiser)
    base_loss, adapted_loss = (held_out_loss(one, data.samples) for one in (tiny.denoiser, adapted))
    assert adapted_loss < 0.6 * base_loss
    judge = Judge.load()
    before, after = (
        generate(one, [f"a {subject}" for subject in UNTAUGHT], seed=1, steps=12) for one in (tiny.denoiser, adapted)
    )
    # Black on white, and still the subject: both as somebody sees them who was shown all styles.
    assert colourless(after) > 0.7 > 0.65 > colourless(before)
    for pictures, at_least in ((before, 7), (after, 6)):
        recognised = sum(seen == subject for seen, subject in zip(judge.subjects(pictures), UNTAUGHT, strict=True))
        assert recognised >= at_least
