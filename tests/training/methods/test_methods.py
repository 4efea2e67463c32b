"""Methods that change a step's goal, or replace it: their losses and gradients against plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lever_cases import flux_dataset
from torch import Tensor

from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.trainable import Trainable
from tests.training.methods.gradient_cases import Predict, check, gradients, mean

SLIDER = {"slider_positive": "a red apple", "slider_negative": "a lion", "slider_guidance": 2.0}


@pytest.fixture
def texts(tiny: Model, dataset: EncodedDataset) -> EncodedDataset:
    """Samples with the encoder of their captions."""
    return EncodedDataset(dataset.samples[:4], EncodedCaptions(tiny.text_encoder.encode))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("settings", [{"preserve": "blank"}, SLIDER])
def test_memory_is_planned_without_their_texts(
    hand_made: Trainable, texts: EncodedDataset, settings: dict[str, Any]
) -> None:
    plain = {"steps": 2, "rank": 2, "targets": "*.attn2.to_q", "training_dtype": "fp32", **settings}
    assert train(hand_made, texts, **plain, activations="auto").losses == train(hand_made, texts, **plain).losses


@pytest.fixture
def flux_texts(flux: Model) -> EncodedDataset:
    """Samples of a model with distilled guidance, whose texts come from a table."""
    data = flux_dataset()
    samples = tuple(replace(one, conditioning=replace(one.conditioning, text=one.name)) for one in data.samples)

    def encode(text: str) -> Conditioning:
        kept = {name: 0.5 * tensor for name, tensor in samples[0].conditioning.tensors.items() if name != "guidance"}
        return Conditioning(kept, text)

    return EncodedDataset(samples, EncodedCaptions(encode))


def test_pictures_of_the_class_are_held_to_the_base_model(hand_made: Trainable, texts: EncodedDataset) -> None:
    data = replace(texts, samples=tuple(replace(one, is_class=index > 1) for index, one in enumerate(texts.samples)))

    def reference(batch: Batch, trained: Predict, frozen: Predict, target: Tensor) -> Tensor:
        of_class = torch.tensor([int(name[0]) > 1 for name in batch.names])
        goal = torch.where(of_class[:, None, None, None], frozen(batch.conditioning), target)
        return mean(trained(batch.conditioning) - goal)

    check(gradients(hand_made, data, reference, prior_target="model"))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("objective", ["native", "x0"])
def test_the_base_model_is_the_target_outside_of_masks(
    hand_made: Trainable, texts: EncodedDataset, objective: str
) -> None:
    kind = PARAMETERIZATIONS[hand_made.diffusion.parameterization]
    inside = torch.zeros(8, 8)
    inside[:, :5] = 2.0
    data = replace(texts, samples=tuple(replace(one, places=inside) for one in texts.samples))

    def reference(batch: Batch, trained: Predict, frozen: Predict, target: Tensor) -> Tensor:
        prediction, kept = trained(batch.conditioning), frozen(batch.conditioning)
        scale = kind.clean_scale(batch.level) if objective == "x0" else torch.ones(4)
        loss = 2 * (prediction - target)[..., :5].square().flatten(1).sum(1)
        loss = loss + 0.5 * (prediction - kept)[..., 5:].square().flatten(1).sum(1)
        return scale * loss / target[0].numel()

    losses, gradient, expected, other = gradients(
        hand_made, data, reference, mask_prior_weight=0.5, objective=objective
    )
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("schedule", ["constant", "sigma"])
def test_targets_are_guided_and_the_network_knows_it(flux: Model, flux_texts: EncodedDataset, schedule: str) -> None:
    def reference(batch: Batch, trained: Predict, frozen: Predict, target: Tensor) -> Tensor:
        guidance = torch.full_like(batch.level.sigma, 3.0)
        guidance = 1 + 2 * batch.level.sigma if schedule == "sigma" else guidance
        with torch.no_grad():
            away = trained(batch.texts["unconditional"])
        goal = away + guidance[:, None, None, None] * (target - away)
        guided = replace(batch.conditioning, tensors={**batch.conditioning.tensors, "guidance": guidance})
        return mean(trained(guided) - goal)

    check(gradients(flux, flux_texts, reference, guidance_loss="3", guidance_loss_schedule=schedule))


def test_a_range_of_guidance_is_drawn_from(flux: Model, flux_texts: EncodedDataset) -> None:
    results = [train(flux, flux_texts, steps=2, rank=2, guidance_loss=text).losses for text in ("2", "2-2", "2-4")]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(("asked", "has_own", "expected"), [
    (None, False, 1.0), (None, True, 3.5), (0.0, False, None), (0.0, True, 3.5), (2.0, True, 2.0), (2.0, False, 2.0),
])  # fmt: skip
def test_pictures_are_trained_at_the_usual_guidance_unless_they_have_their_own(
    flux: Model, asked: float | None, has_own: bool, expected: float | None
) -> None:
    """The default is 1; 0 is the conditioning's, and without one what the network draws with."""
    job = plan_job(flux.denoiser, TrainConfig(training_guidance=asked, rank=2), "cpu")
    given = [one.conditioning for one in flux_dataset().samples[:2]]
    kept = [replace(one, tensors={k: t for k, t in one.tensors.items() if has_own or k != "guidance"}) for one in given]
    joined = job.model.join(kept).tensors
    assert joined["guidance"].tolist() == [expected] * 2 if expected else "guidance" not in joined
    assert job.config.training_guidance == (1.0 if asked is None else asked)


def test_the_guidance_of_training_is_the_networks_input(flux: Model, flux_texts: EncodedDataset) -> None:
    def reference(batch: Batch, trained: Predict, frozen: Predict, target: Tensor) -> Tensor:
        given = torch.full((len(batch.names),), 1.5)
        guided = replace(batch.conditioning, tensors={**batch.conditioning.tensors, "guidance": given})
        return mean(trained(guided) - target)

    check(gradients(flux, flux_texts, reference, training_guidance=1.5))
    plain = train(flux, flux_texts, steps=1, rank=2).losses
    assert train(flux, flux_texts, steps=1, rank=2, training_guidance=3.5).losses == plain  # the samples' own
    assert train(flux, flux_texts, steps=1, rank=2, training_guidance=1.0).losses != plain


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("settings", [{}, {"pissa": True}, {"targets": "all"}, {"alpha": 2.0}])
def test_the_change_of_the_weights_has_a_price(
    hand_made: Trainable, texts: EncodedDataset, settings: dict[str, Any]
) -> None:
    job = plan_job(hand_made, TrainConfig(rank=4, weight_change=0.3, training_dtype="fp32", **settings), "cpu")
    plain = plan_job(hand_made, TrainConfig(rank=4, training_dtype="fp32", **settings), "cpu")
    found = []
    for one in (job, plain):
        engine = engine_of(one)
        random = torch.randn(len(engine.flat.master), generator=torch.Generator().manual_seed(0))
        engine.flat.master.add_(random * 0.02)
        with engine.prepared():
            engine.gradient(batch_maker(one.model, texts, one.config, engine.way).step(0))
        found.append(engine.flat.grad.clone())
    engine.flat.zero()
    total = torch.zeros(())
    for path, adapter in plain.adapters.items():
        weight = hand_made.module.get_submodule(path).get_parameter("weight").float()
        down, up, _ = adapter.factors()  # type: ignore[operator]
        change = adapter.scale * (up.flatten(1) @ down.flatten(1))  # type: ignore[operator]
        total = total + 0.3 * change.square().sum()
        torch.testing.assert_close(adapter.merged(weight) - weight, change.reshape(weight.shape), rtol=1e-3, atol=1e-5)
    total.backward()
    engine.flat.collect()
    assert float(engine.flat.grad.norm()) > 0
    torch.testing.assert_close(found[0], found[1] + engine.flat.grad, rtol=1e-4, atol=1e-6)
