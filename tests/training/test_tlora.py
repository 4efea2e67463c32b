"""T-LoRA: ranks by noise level in steps, validation and pictures, against LoRAs that were cut to these ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.adapters.lora import LowRank
from lorasmith.adapters.variants import OrthogonalAdapter, gaussian_singular_values
from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.data.dataset import EncodedDataset
from lorasmith.diffusion.schedule import PARAMETERIZATIONS, DiscreteSchedule, FlowSchedule
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Denoiser, Model
from lorasmith.formats.metadata import RANKS_ENTRY, LeveledRanks
from lorasmith.runs.library import train
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult, lora_of
from lorasmith.training.trainable import Trainable, trainable
from lorasmith.training.validation import Validator
from tests.covering import slow_except
from tests.training.lever_cases import flux_dataset

SETTINGS: dict[str, Any] = {"rank": 6, "training_dtype": "fp32", "learning_rate": 1e-3, "tlora": "plain"}
LAYERS = "*.attn1.*, *.0.attn2.to_q, *.resnets.0.conv1"
HAND_MADE = "*attn*, enter"
"""Layers of the hand-made denoiser, a convolution among them."""
Run = Callable[..., TrainResult]


def planned(model: Model | Trainable, **settings: Any) -> TrainJob:
    given = model.denoiser if isinstance(model, Model) else model
    return plan_job(given, TrainConfig(**({"targets": LAYERS} | SETTINGS | settings)), "cpu")


def test_ranks_are_those_of_the_paper() -> None:
    for rank, least, alpha in ((16, 1, 1.0), (64, 32, 1.0), (8, 2, 2.0), (5, 1, 0.5)):
        schedule = RankSchedule(least, alpha)
        time = torch.arange(1000)
        share = DiscreteSchedule.scaled_linear().share(time)
        expected = [int(((1000 - t) / 1000) ** alpha * (rank - least)) + least for t in range(1000)]

        assert schedule.ranks(share, rank).tolist() == expected
        assert (expected[0], schedule.ranks(torch.ones(1), rank).item()) == (rank, least)
        assert torch.equal(schedule.mask(share, rank).sum(1).long(), torch.tensor(expected))
        assert (schedule.mask(share, rank).diff(dim=1) <= 0).all()  # the first are kept
        for index in range(rank):  # `start` is the inverse
            start = schedule.start(index, rank)
            levels = torch.tensor([start - 1e-4, start + 1e-4], dtype=torch.float64)
            used = schedule.ranks(levels.clamp(0, 1), rank) > index
            assert used[0] and (index < least or not used[1])
    assert RankSchedule(4, 1.0).ranks(torch.tensor([0.0, 1.0]), 2).tolist() == [2, 2]  # a layer of fewer ranks
    flow = FlowSchedule(shift=3.0, time_scale=1000.0)
    level = flow.at(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(flow.share(level.time).float(), level.sigma)


def moved(job: TrainJob) -> TrainJob:
    """The job with adapters that are not the identity."""
    random = torch.Generator().manual_seed(0)
    for adapter in job.adapters.values():
        for parameter in adapter.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return job


LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "orthogonal": {"tlora": "orthogonal"},
    "power and least": {"tlora_alpha": 2.0, "tlora_min_rank": 3},
    "attention": {"targets": "*attn*"},
    "alpha": {"alpha": 2.0, "tlora": "orthogonal", "rslora": True},
    "checkpointing": {"gradient_checkpointing": True},
    "lean": {"activations": "lean"},
    "quantized": {"quantization": "int8"},
    "two batches": {"batch_size": 2, "grad_accumulation_steps": 2},
    "compiled": {"compile": True, "targets": "*.attn2.*"},
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("lever", slow_except(LEVERS, "orthogonal", "power and least", "checkpointing"))
def test_each_sample_trains_the_ranks_of_its_level(hand_made: Trainable, dataset: EncodedDataset, lever: str) -> None:
    job = moved(planned(hand_made, **({"batch_size": 4, "targets": HAND_MADE} | LEVERS[lever])))
    schedule, rank = job.config.rank_schedule, job.config.rank
    assert schedule is not None
    engine = engine_of(job)
    batches = batch_maker(job.model, dataset, job.config, engine.way, engine.rank_masks).step(0)
    with engine.prepared():
        losses, _ = engine.gradient(batches)
    found = {name: tensor.clone() for name, tensor in gradients(job).items()}
    engine.flat.zero()
    expected = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    seen, alone = set(), []
    with job.model.frozen(job.config, engine.way), adapters_attached(job.model.module, [Attached(job.adapters)]):
        for batch in batches:
            for row, used in enumerate(schedule.ranks(job.model.diffusion.schedule.share(batch.level.time), rank)):
                for adapter in job.adapters.values():
                    assert isinstance(adapter, LowRank)
                    adapter.mask = (torch.arange(rank) < used).float()[None]
                loss = loss_of(job, batch, row)
                (loss / job.config.samples_per_step).backward()
                seen.add(int(used))
                alone.append(loss.detach())
                for name, gradient in gradients(job).items():
                    assert not gradient.transpose(0, int(name.endswith("up")))[used:].any()
                    expected[name] += gradient
                    gradient.zero_()
    assert len(seen) > 1
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-6)
    for name, gradient in found.items():
        assert gradient.any()
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()), msg=name
        )


def gradients(job: TrainJob) -> dict[str, Tensor]:
    """The gradient of each adapter's down and up."""
    parameters = ((path, *one) for path, adapter in job.adapters.items() for one in adapter.named_parameters())
    return {f"{path}.{name}": parameter.grad for path, name, parameter in parameters if parameter.grad is not None}


def loss_of(job: TrainJob, batch: Batch, row: int) -> Tensor:
    """The loss of a sample alone."""
    level, one = batch.level, slice(row, row + 1)
    tensors = {name: tensor[one] for name, tensor in batch.conditioning.tensors.items()}
    prediction = job.model.predict(batch.noised[one], level.time[one], Conditioning(tensors))
    target = PARAMETERIZATIONS[job.model.diffusion.parameterization].target(batch.clean, batch.noise, level)
    return (prediction - target[one]).square().mean()


def cut(lora: Lora, used: int, copies: int) -> Lora:
    """The LoRA with its first ranks alone, at the same scale, which other programs would apply alike."""
    adapters = {}
    for ref, weights in lora.state.adapters.items():
        rank, last = weights.tensors["down"].shape[0], used * copies
        tensors = {"down": weights.tensors["down"][:last], "up": weights.tensors["up"][:, :last]}
        adapters[ref] = replace(weights, tensors=tensors, alpha=(weights.alpha or rank) * last / rank)
    return replace(lora, state=AdapterState(adapters))


def predictions(model: Denoiser, time: Tensor) -> Tensor:
    """Predictions for a latent at each of these times, in one batch."""
    if model.base.components.text_encoders == {}:
        sample = flux_dataset().samples[0]
        latents, conditioning = sample.latents[None], sample.conditioning
    else:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with model.base.text_encoder.active():
            conditioning = model.base.text_encoder.encode("a fox")
    tensors = {
        name: tensor.repeat(len(time), *(1,) * (tensor.ndim - 1)) for name, tensor in conditioning.tensors.items()
    }
    with torch.no_grad(), model.active():
        return model.predict(latents.repeat(len(time), 1, 1, 1), time, Conditioning(tensors))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("tlora", ["plain", "orthogonal"])
@pytest.mark.parametrize("name", ["tiny", "flux"])
def test_a_file_is_applied_with_the_ranks_of_each_sample(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, tlora: str
) -> None:
    model: Model = request.getfixturevalue(name)
    data = request.getfixturevalue("dataset") if name == "tiny" else flux_dataset()
    targets = {"targets": LAYERS if name == "tiny" else "*"}
    settings: dict[str, Any] = SETTINGS | targets | {"tlora": tlora, "learning_rate": 1e-2, "lora_dtype": "fp32"}
    result = train(model, data, steps=2, batch_size=4, **settings)
    lora = Lora.load(result.lora.save(tmp_path / "subject.safetensors"), model)
    copies = 2 if tlora == "orthogonal" else 1
    assert lora.rank_schedule == RankSchedule(1, 1.0, copies)

    shares = torch.tensor([0.999, 0.65, 0.3, 0.01])
    time = (shares * 1000).round() if name == "tiny" else shares
    found = predictions(lora.applied_to(model.denoiser, bypass=False), time)

    for row, used in enumerate([1, 2, 4, 5]):
        alone = predictions(cut(lora, used, copies).applied_to(model.denoiser), time[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-3, atol=1e-4)
        everything = predictions(cut(lora, 6, copies).applied_to(model.denoiser), time[row : row + 1])
        assert row > 1 or (found[row] - everything[0]).abs().max() > 1e-3  # few steps train the last ranks little


def test_a_lora_of_other_ranks_is_applied_whole_and_says_so(tiny: Model, dataset: EncodedDataset, run: Run) -> None:
    lora = run(dataset, tlora="plain", targets=LAYERS).lora
    other = replace(lora, state=replace(cut(lora, 2, 1).state, metadata=lora.state.metadata))

    assert other.rank_schedule is None
    applied = other.applied(tiny.denoiser, None)
    assert "has other ranks since, so that all are used" in applied.note
    assert applied.denoiser.patches[0].ranks is None
    assert lora.applied(tiny.denoiser, None).note == ""
    with pytest.raises(LoraError, match="or leave strict off"):
        other.applied(tiny.denoiser, None, strict=True)


@pytest.mark.parametrize(
    "entry", ["", "{}", "[1]", '{"min_rank": 0}', "\ud800", '{"min_rank":1,"alpha":1e9,"copies":1,"total":4}', "nan"]
)
def test_an_entry_of_a_stranger_is_no_schedule(entry: str) -> None:
    assert LeveledRanks.of({RANKS_ENTRY: entry}) is None


def test_held_out_losses_use_the_ranks_of_their_level(tiny: Model, dataset: EncodedDataset) -> None:
    job = moved(planned(tiny))
    engine = engine_of(job)
    measure = Validator(
        job.model, dataset.samples[:1], draws=4, batch_size=4, device=engine.way.device, dtype=torch.float32
    )
    with engine.prepared():
        found, everything = measure(engine.rank_masks), measure()
    lora = lora_of(job, {})
    for draw, used in enumerate([5, 4, 2, 1]):
        alone = trainable(cut(lora, used, 1).applied_to(tiny.denoiser))
        with alone.frozen(job.config, engine.way):
            expected = Validator(
                alone, dataset.samples[:1], draws=4, batch_size=4, device=engine.way.device, dtype=torch.float32
            )()
        torch.testing.assert_close(found[0, draw], expected[0, draw], rtol=1e-3, atol=1e-5)
    assert ((found - everything).abs() > 1e-4).any()


def test_the_orthogonal_start_is_that_of_a_random_matrix() -> None:
    layer = FrozenLayer(nn.Conv2d(40, 60, 3))
    adapter = OrthogonalAdapter.create(layer, rank=8, alpha=4.0, seed=0, path="a", zero="up")
    weights = adapter.to_weights()
    down, up = weights.tensors["down"].flatten(1), weights.tensors["up"].flatten(1)
    start = down[1::2], up[:, 0::2]  # of each rank, the trained down is first and still zero
    assert not down[0::2].any() and not up[:, 1::2].any()
    values = torch.linalg.svdvals(torch.randn(60, 360, generator=torch.Generator().manual_seed(0)))[-8:] / 8
    for found in (start[0] @ start[0].T, start[1].T @ start[1]):
        torch.testing.assert_close(found, torch.diag(found.diag()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.diag() / 2, values, rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (200, 50)])
def test_singular_values_are_those_of_gaussian_matrices(shape: tuple[int, int]) -> None:
    expected = torch.stack(
        [torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in range(20)]
    ).mean(0)
    found = gaussian_singular_values(*shape)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.15)


def test_a_file_is_continued_with_its_ranks(tiny: Model, dataset: EncodedDataset, run: Run, tmp_path: Path) -> None:
    first = run(dataset, tlora="orthogonal", targets=LAYERS).lora.save(tmp_path / "first.safetensors")
    settings: dict[str, Any] = {"existing_lora": str(first), "targets": LAYERS}
    again = run(dataset, tlora="plain", **settings).lora
    assert again.rank_schedule == RankSchedule(1, 1.0)
    assert set(again.ranks) == {8}
    (note,) = (one for one in planned(tiny, **(settings | {"tlora": "none"})).notes if "is a T-LoRA" in one)
    assert "all ranks are trained at each noise level here; set tlora" in note
    with pytest.raises(OptionError, match="tlora orthogonal starts all layers, but"):
        planned(tiny, **(settings | {"tlora": "orthogonal", "targets": f"{LAYERS}, *.ff.*"}))
    whole = replace(again, state=replace(again.state, metadata={})).save(tmp_path / "whole.safetensors")
    assert not any("is a T-LoRA" in one for one in planned(tiny, existing_lora=str(whole), tlora="none").notes)
