"""Methods on pairs of pictures: losses and gradients against plain autograd, fresh LoRAs, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lever_cases import flux_dataset
from torch import Tensor

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.methods.slider import difference_weights
from lorasmith.training.trainable import Trainable
from tests.training.methods.gradient_cases import check, gradients, mean


def paired(data: EncodedDataset) -> EncodedDataset:
    """Four samples with opposites."""
    g = torch.Generator().manual_seed(7)
    opposites = [one.latents + torch.randn(one.latents.shape, generator=g) for one in data.samples[:4]]
    pairs = zip(data.samples, opposites, strict=False)
    return EncodedDataset(tuple(replace(one, opposite=other) for one, other in pairs))


@pytest.fixture
def pairs(dataset: EncodedDataset) -> EncodedDataset:
    return paired(dataset)


def of_slider(kind: str, focus: float) -> Any:
    """The loss of a slider from pairs, term by term."""

    def reference(batch: Batch, trained: Any, frozen: Any, target: Tensor) -> Tensor:
        assert batch.opposite is not None
        total = torch.zeros(len(batch.names))
        for index in range(len(batch.names)):
            change = (batch.clean[index] - batch.opposite.clean[index]).abs().mean(0)
            weight = 1 - focus + focus * (change / change.mean()).clamp(max=8)
            for strength, side in ((1.0, batch), (-1.0, batch.opposite)):
                goal = PARAMETERIZATIONS[kind].target(side.clean, side.noise, side.level)
                error = (trained(side.conditioning, strength, side.noised) - goal)[index].square()
                places = 1.0 if side.places is None else side.places[index]
                total[index] = total[index] + (error * weight * places).mean() / 2
        return total

    return reference


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pair_focus": 0.0, "gradient_checkpointing": True},
        {"pair_focus": 0.5, "algorithm": "LoKr"},
        {"algorithm": "LoHa", "targets": "all-linear"},
    ],
    ids=["LoRA", "checkpointed", "LoKr", "LoHa"],
)
def test_a_slider_has_pictures_at_one_end_and_opposites_at_the_other(
    hand_made: Trainable, pairs: EncodedDataset, settings: dict[str, Any]
) -> None:
    reference = of_slider(hand_made.diffusion.parameterization, settings.get("pair_focus", 1.0))
    check(gradients(hand_made, pairs, reference, pairs="slider", **settings))


def test_masks_weigh_both_pictures_of_a_pair(flux: Model) -> None:
    inside = torch.ones(8, 8)
    inside[:4] = 0
    data = paired(flux_dataset())
    masked = EncodedDataset(tuple(replace(one, places=inside) for one in data.samples))
    check(gradients(flux, masked, of_slider("flow", 1.0), pairs="slider"))


def fresh_losses(model: Model | Trainable, data: EncodedDataset, **settings: Any) -> tuple[Tensor, float]:
    """Losses of a step of a fresh LoRA, and the norm of its gradient."""
    given = model.denoiser if isinstance(model, Model) else model
    job = plan_job(given, TrainConfig(rank=4, training_dtype="fp32", batch_size=4, **settings), "cpu")
    engine = engine_of(job)
    with engine.prepared():
        losses, _ = engine.gradient(batch_maker(job.model, data, job.config, engine.way).step(0))
    return losses, float(engine.flat.grad.norm())


def test_a_fresh_slider_has_the_loss_of_the_base_model(hand_made: Trainable, pairs: EncodedDataset) -> None:
    slider, norm = fresh_losses(hand_made, pairs, pairs="slider", pair_focus=0.0)
    both = [replace(one, opposite=None) for one in pairs.samples]
    lows = [replace(one, latents=one.opposite, opposite=None) for one in pairs.samples if one.opposite is not None]
    plain = sum(fresh_losses(hand_made, EncodedDataset(tuple(some)))[0] for some in (both, lows)) / 2
    torch.testing.assert_close(slider, plain)
    assert norm > 0


def test_the_ends_of_a_slider_are_opposite_changes_of_the_weights(tiny: Model, pairs: EncodedDataset) -> None:
    result = train(tiny, pairs, steps=2, rank=2, pairs="slider", learning_rate=1e-2, targets="attention")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    before = tiny.components.denoiser.get_submodule(path).get_parameter("weight").detach().clone()
    changes = []
    for strength in (1.0, -1.0):
        with result.lora.applied_to(tiny, strength=strength).active():
            weight = tiny.components.denoiser.get_submodule(path).get_parameter("weight").detach()
            changes.append((weight - before).float())
    assert float(changes[0].norm()) > 0
    # Both are rounded in the dtype of the base model's weights.
    torch.testing.assert_close(changes[0], -changes[1], rtol=0.05, atol=2e-3 * float(before.abs().max()))


def test_weights_of_places_follow_the_difference() -> None:
    one, other = torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8)
    other[0, :, 0, 0] = torch.tensor([1.0, 3.0])
    weights = difference_weights(one, other, 1.0)
    assert weights.shape == (1, 1, 2, 8)
    assert float(weights[0, 0, 0, 0]) == 8  # 16 times the mean, capped
    assert float(weights.sum()) == 8
    assert torch.equal(difference_weights(one, other, 0.0), torch.ones(1, 1, 2, 8))
    assert torch.equal(difference_weights(one, one, 1.0), torch.zeros(1, 1, 2, 8))  # nothing differs


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_a_preference_is_that_of_the_paper(hand_made: Trainable, pairs: EncodedDataset, kind: str) -> None:
    model, beta = Trainable(hand_made.module, diffusion=kind), 20.0

    def reference(batch: Batch, trained: Any, frozen: Any, target: Tensor) -> Tensor:
        assert batch.opposite is not None
        margin = torch.zeros(len(batch.names))
        for sign, side in ((1, batch), (-1, batch.opposite)):
            goal = PARAMETERIZATIONS[kind].target(side.clean, side.noise, side.level)
            now = mean(trained(side.conditioning, 1.0, side.noised) - goal)
            margin = margin + sign * (now - mean(frozen(side.conditioning, side.noised) - goal))
        losses = [torch.log1p(torch.exp(beta / 2 * one)) for one in margin]  # −log σ(−β/2 m)
        return torch.stack(losses)

    found = gradients(model, pairs, reference, targets="all", pairs="dpo", dpo_beta=beta)
    check(found)
    assert float((found[0] - math.log(2)).abs().max()) > 1e-3
    losses, norm = fresh_losses(model, pairs, targets="all", pairs="dpo", dpo_beta=beta)
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)))
    assert norm > 0


def test_pairs_and_methods_belong_together(
    hand_made: Trainable, dataset: EncodedDataset, pairs: EncodedDataset
) -> None:
    with pytest.raises(
        OptionError, match=r"pairs slider needs two pictures for each sample, but 0.png has no opposite"
    ):
        train(hand_made, dataset, steps=1, pairs="slider")
    with pytest.raises(OptionError, match=r"0.png has an opposite, which a run has with pairs slider or dpo alone"):
        train(hand_made, pairs, steps=1)
    with pytest.raises(DataError, match=r"the opposite of a sample must be a tensor of floats \(4, 8, 8\) as its lat"):
        Sample(torch.zeros(4, 8, 8), Conditioning({}), opposite=torch.zeros(4, 8, 4))
    with pytest.raises(DataError, match=r"latents must be finite, got NaN or infinity for the opposite of a"):
        EncodedDataset((Sample(torch.zeros(4, 8, 8), name="a", opposite=torch.full((4, 8, 8), math.nan)),))


def test_sliders_say_so_in_their_files(hand_made: Trainable, pairs: EncodedDataset) -> None:
    sliders = TrainConfig(pairs="slider"), TrainConfig(slider_positive="old")
    assert all(one.consequences().is_slider for one in sliders)
    assert not TrainConfig(pairs="dpo").consequences().is_slider
    metadata = train(hand_made, pairs, steps=1, rank=2, pairs="slider").lora.metadata
    assert metadata["ss_slider"] == "True"
    assert "ss_slider" not in train(hand_made, pairs, steps=1, rank=2, pairs="dpo").lora.metadata
