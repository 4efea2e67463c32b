"""LoRAs trained with controls: what is learnt from them, what they are kept out of, and what diffusers applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_transformer_loras import assert_applied
from torch import Tensor
from transformer_models import Case

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of("flux2-klein", tmp_path_factory.mktemp("klein"))


def colours(model: Model) -> list[Tensor]:
    channels = model.components.latent.channels
    return [models.seeded(f"colour {index}", (channels, 1, 1), seed=0).expand(channels, 2, 2) for index in range(4)]


def pairs(model: Model, *, shift: int = 0) -> EncodedDataset:
    """Four pictures of one colour each, which are controls too: of themselves, or of those `shift` further on."""
    with model.text_encoder.active():
        caption = model.text_encoder.encode("the same again")
    found = colours(model)
    return EncodedDataset(
        tuple(
            Sample(one.contiguous(), caption.with_controls([found[(index + shift) % 4][None]]), f"{index}.png")
            for index, one in enumerate(found)
        )
    )


def run(model: Model, data: EncodedDataset, **settings: Any) -> TrainResult:
    given = {"rank": 8, "training_dtype": "fp32", "lora_dtype": "fp32", "validation_share": 0.0, "seed": 1}
    return train(model, data, **{**given, **settings})


def loss_of(model: Any, data: EncodedDataset) -> float:
    """Mean loss at noise that no run has seen."""
    config = TrainConfig(batch_size=4, seed=987_654, training_dtype="fp32")
    job = plan_job(model, config, torch.device("cpu"))
    maker = engine.batch_maker(job.model, data.samples, job.config, job.runtime)
    with torch.no_grad(), model.active():
        batches = [batch for step in range(8) for batch in maker.step(step)]
        losses = [engine.sample_losses(job.model, batch, job.config, job.runtime) for batch in batches]
    return torch.cat(losses).mean().item()


def test_copying_the_control_is_learnt_and_from_shuffled_ones_it_is_not(klein: Case) -> None:
    model, straight = klein.ours, pairs(klein.ours)
    settings = {"steps": 60, "batch_size": 4, "algorithm": "Full", "learning_rate": 6e-3, "targets": "all-linear"}
    learnt = [
        run(model, data, **settings).lora.applied_to(model.denoiser) for data in (straight, pairs(model, shift=1))
    ]
    before, copied, shuffled = (loss_of(one, straight) for one in (model.denoiser, *learnt))
    other = loss_of(learnt[0], pairs(model, shift=1))
    assert copied - klein.tiny.unlearnt < 0.25 * before, (before, copied)
    assert shuffled > 0.9 * before and other > 0.9 * before, (before, shuffled, other)


def test_controls_are_free_of_noise_and_outside_the_loss(klein: Case) -> None:
    model, data = klein.ours, pairs(klein.ours)
    job = plan_job(model.denoiser, TrainConfig(batch_size=4, training_dtype="fp32"), torch.device("cpu"))
    maker = engine.batch_maker(job.model, data.samples, job.config, job.runtime)
    for step in range(2):
        (batch,) = maker.step(step)
        (control,) = batch.conditioning.controls
        assert torch.equal(control, batch.clean) and not torch.equal(batch.noised, batch.clean)
        with torch.no_grad(), model.denoiser.active():
            prediction = engine.prediction_of(job.model, batch, job.runtime)
        assert prediction.shape == batch.clean.shape


def test_a_lora_trained_with_controls_is_applied_completely_by_diffusers(klein: Case, tmp_path: Path) -> None:
    result = run(klein.ours, pairs(klein.ours), steps=2, batch_size=2, learning_rate=1e-2)
    lora = assert_applied(klein, result.lora.save(tmp_path / "edit.safetensors"))
    assert all(one.tensors["up"].any() for one in lora.state.adapters.values())


def test_samples_of_other_numbers_and_sizes_of_controls_train_together_as_they_do_alone(klein: Case) -> None:
    data, found = pairs(klein.ours), colours(klein.ours)
    given = [[], [found[0][None]], [found[1][None], found[2][None]], [found[3].repeat(1, 2, 1)[None]]]
    mixed = EncodedDataset(
        tuple(
            Sample(one.latents, one.conditioning.with_controls(controls), one.name)
            for one, controls in zip(data.samples, given, strict=True)
        )
    )
    together = run(klein.ours, mixed, steps=1, batch_size=4)
    apart = run(klein.ours, mixed, steps=1, batch_size=1, grad_accumulation_steps=4)
    assert together.losses == pytest.approx(apart.losses, rel=1e-5)
