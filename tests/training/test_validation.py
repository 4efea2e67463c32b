"""The loss of held-out images: fixed, comparable, and what the model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.errors import TrainingError
from lorasmith.core.random import keyed_normal
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.trainable import Trainable
from lorasmith.training.validation import Validator

CPU = torch.device("cpu")
Make = Callable[..., Validator]


@pytest.fixture
def make(hand_made: Trainable, mixed: EncodedDataset) -> Make:
    def validator(samples: tuple[Sample, ...] = mixed.samples, *, draws: int = 2, batch_size: int = 3) -> Validator:
        return Validator(hand_made, samples, draws=draws, batch_size=batch_size, device=CPU, dtype=torch.float32)

    return validator


def test_losses_are_those_of_the_model_one_by_one(make: Make, hand_made: Trainable, mixed: EncodedDataset) -> None:
    validator = make(draws=2)
    losses = validator()
    assert losses.shape == validator.quantiles.shape == (len(mixed), 2)
    diffusion = hand_made.diffusion
    for row, sample in enumerate(mixed.samples):
        for draw in range(2):
            clean = sample.latents[None]
            noise = keyed_normal(tuple(clean.shape[1:]), 0, "validation noise", f"{sample.name}/{draw}")[None]
            level = diffusion.schedule.at(validator.quantiles[row, draw][None])
            noised = level.noised(clean, noise)
            with torch.no_grad():
                prediction = hand_made.predict(noised, level.time, sample.conditioning)
            expected = diffusion_loss(
                prediction,
                Batch(clean, noise, noised, level, sample.conditioning, (sample.name,)),
                parameterization=diffusion.parameterization,
                objective="native",
                loss_function="MSE",
            )
            assert losses[row, draw].item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_image_is_measured_alike_in_any_company(make: Make, mixed: EncodedDataset) -> None:
    alone, losses = make(mixed.samples[2:3]), make()()
    assert alone.names == (mixed.samples[2].name,)
    torch.testing.assert_close(alone()[0], losses[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(make(batch_size=7)(), losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("draws", [1, 8])
def test_each_image_meets_every_part_of_the_schedule_once(make: Make, draws: int) -> None:
    quantiles = make(draws=draws).quantiles
    assert torch.equal((quantiles * draws).floor(), torch.arange(draws).expand_as(quantiles).float())
    assert len((quantiles * draws % 1)[:, 0].unique()) == len(quantiles)  # each at places of its own


def test_repeats_are_looked_at_once_and_images_of_one_name_meet_different_noise(
    make: Make, mixed: EncodedDataset
) -> None:
    one, other = mixed.samples[:2]
    assert make((one, one, other, one)).names == (one.name, other.name)
    twins = make((one, replace(one)))
    assert twins.names == (one.name, one.name)
    assert not torch.equal(twins.quantiles[0], twins.quantiles[1])
    assert not torch.isclose(*twins()).any()


def test_what_is_attached_counts_and_no_gradient_is_kept(make: Make, hand_made: Trainable) -> None:
    validator = make()
    base = validator()
    job = plan_job(hand_made, TrainConfig(rank=4, training_dtype="fp32", targets="*attn*"), CPU)
    with adapters_attached(hand_made.module, [Attached(job.adapters, differences={})]):
        fresh = validator()
        for adapter in job.adapters.values():
            for name, parameter in adapter.named_parameters():
                if name.endswith("up"):
                    torch.nn.init.constant_(parameter, 0.05)
        changed = validator()
    torch.testing.assert_close(fresh, base, rtol=1e-4, atol=1e-6)
    assert not torch.isclose(changed, base).any()
    assert not changed.requires_grad
    assert torch.equal(validator(), base)


def test_a_loss_that_is_not_finite_names_its_image(
    make: Make, mixed: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator = make(mixed.samples[:2], draws=4, batch_size=4)
    original = Trainable.predict
    calls = 0

    def broken(self: Trainable, *args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, *args) / (calls - 1)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainable, "predict", broken)
    with pytest.raises(TrainingError, match=f"NaN or infinity for {mixed.samples[0].name}; try a lower learning rate$"):
        validator()


def test_where_memory_is_too_small_images_are_looked_at_one_by_one(
    make: Make, mixed: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(mixed.samples[:3], draws=2, batch_size=4)()
    original = Trainable.predict

    def scarce(self: Trainable, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, latents, *rest)

    monkeypatch.setattr(Trainable, "predict", scarce)
    torch.testing.assert_close(make(mixed.samples[:3], draws=2, batch_size=4)(), expected)
