"""LoRAs trained with controls: what is learnt from them, what they are kept out of, and what diffusers applies."""

from __future__ import annotations

from dataclasses import replace
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
from lorasmith.formats.names import matches
from lorasmith.runs.library import train
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult
from tests.covering import slow_except

# Qwen-Image's is the variant that is told that controls are clean, as Krea 2 is.
EDIT = {"flux2-klein": None, "qwen-image": "edit-2511", "krea2": None, "qwen-image-2.1": None}


@pytest.fixture(scope="module", params=EDIT)
def editing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case.of(request.param, tmp_path_factory.mktemp(request.param))
    return replace(case, ours=case.ours.as_edit(EDIT[case.name]))


def colours(model: Model) -> list[Tensor]:
    latent = model.components.latent
    shape = latent.shape(2 * latent.downscale, 2 * latent.downscale)
    colour = (*shape[:-2], 1, 1)
    return [models.seeded(f"colour {index}", colour, seed=0).expand(shape) for index in range(4)]


def pairs(model: Model, *, shift: int = 0) -> EncodedDataset:
    """Four pictures of one colour each, which are controls too: of themselves, or of those `shift` further on."""
    with model.text_encoder.active():
        caption = model.text_encoder.encode("the same again, as it was in the picture")
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
    maker = engine.batch_maker(job.model, data.samples, job.config, job.way)
    with torch.no_grad(), model.active():
        batches = [batch for step in range(8) for batch in maker.step(step)]
        losses = [engine.sample_losses(job.model, batch, job.config, job.way) for batch in batches]
    return torch.cat(losses).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("editing", slow_except(EDIT, "qwen-image"), indirect=True)
def test_copying_the_control_is_learnt_and_from_shuffled_ones_it_is_not(editing: Case) -> None:
    model, straight = editing.ours, pairs(editing.ours)
    steps = 60 if editing.name == "flux2-klein" else 200
    settings = {"steps": steps, "batch_size": 4, "algorithm": "Full", "learning_rate": 6e-3, "targets": "all-linear"}
    learnt = [
        run(model, data, **settings).lora.applied_to(model.denoiser) for data in (straight, pairs(model, shift=1))
    ]
    before, copied, shuffled = (loss_of(one, straight) for one in (model.denoiser, *learnt))
    other = loss_of(learnt[0], pairs(model, shift=1))
    assert copied - editing.tiny.unlearnt < 0.3 * before, (before, copied)
    assert min(shuffled, other) > 2 * copied, (copied, shuffled, other)


@pytest.mark.slow_after(1)
def test_controls_are_free_of_noise_and_outside_the_loss(editing: Case) -> None:
    model, data = editing.ours, pairs(editing.ours)
    job = plan_job(model.denoiser, TrainConfig(batch_size=4, training_dtype="fp32"), torch.device("cpu"))
    maker = engine.batch_maker(job.model, data.samples, job.config, job.way)
    for step in range(2):
        (batch,) = maker.step(step)
        (control,) = batch.conditioning.controls
        assert torch.equal(control, batch.clean) and not torch.equal(batch.noised, batch.clean)
        with torch.no_grad(), model.denoiser.active():
            prediction = engine.prediction_of(job.model, batch, job.way)
        assert prediction.shape == batch.clean.shape


@pytest.mark.slow_after(1)
def test_a_lora_trained_with_controls_is_applied_completely_by_diffusers(editing: Case, tmp_path: Path) -> None:
    result = run(editing.ours, pairs(editing.ours), steps=2, batch_size=2, learning_rate=1e-2)
    lora = assert_applied(editing, result.lora.save(tmp_path / "edit.safetensors"))
    assert all(
        one.tensors["up"].any()
        for ref, one in lora.state.adapters.items()
        if not matches(ref.path, editing.tiny.unreached)
    )


@pytest.mark.slow_after(1)
def test_blocks_that_run_again_in_the_backward_pass_know_the_controls(editing: Case) -> None:
    data, settings = pairs(editing.ours), {"steps": 2, "batch_size": 2, "algorithm": "LoRA"}
    plain, again = (run(editing.ours, data, gradient_checkpointing=one, **settings) for one in (False, True))
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    for ref, one in plain.lora.state.adapters.items():
        other = again.lora.state.adapters[ref]
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow_after(1)
def test_samples_of_other_numbers_and_sizes_of_controls_train_together_as_they_do_alone(editing: Case) -> None:
    data, found = pairs(editing.ours), colours(editing.ours)
    given = [
        [],
        [found[0][None]],
        [found[1][None], found[2][None]],
        [found[3].repeat(*[1] * (found[3].ndim - 2), 2, 1)[None]],
    ]
    mixed = EncodedDataset(
        tuple(
            Sample(one.latents, one.conditioning.with_controls(controls), one.name)
            for one, controls in zip(data.samples, given, strict=True)
        )
    )
    together = run(editing.ours, mixed, steps=1, batch_size=4)
    apart = run(editing.ours, mixed, steps=1, batch_size=1, grad_accumulation_steps=4)
    assert together.losses == pytest.approx(apart.losses, rel=1e-5)
