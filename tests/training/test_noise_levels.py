"""Settings of noise levels and weights, from `TrainConfig` to the losses of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.forms import Expert
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.results import TrainResult
from lorasmith.training.watchers import ValidationWatch

Run = Callable[..., TrainResult]

SETTINGS: dict[str, dict[str, Any]] = {
    "shifted by size": {"timesteps": "shifted"},
    "shift": {"timestep_shift": 3.0},
    "independent draws": {"stratified": False},
    "min-SNR": {"loss_weighting": "min_snr"},
    "soft min-SNR": {"loss_weighting": "soft_min_snr"},
    "gamma": {"loss_weighting": "min_snr", "min_snr_gamma": 1.0},
    "noise offset": {"noise_offset": 0.1},
    "pyramid": {"pyramid_noise": 0.3},
    "perturbation": {"input_perturbation": 0.1},
    "debiased": {"loss_weighting": "debiased"},
    "P2": {"loss_weighting": "p2"},
    "pseudo-Huber": {"loss_function": "PseudoHuber"},
    "cosmap": {"loss_weighting": "cosmap"},
    "pseudo-Huber exponential": {"loss_function": "PseudoHuber", "huber_schedule": "exponential"},
    "pseudo-Huber scaled": {"loss_function": "PseudoHuber", "huber_scale": 3.0},
    "pseudo-Huber by SNR": {"loss_function": "PseudoHuber", "huber_schedule": "snr"},
}


@pytest.mark.slow
def test_every_setting_makes_another_loss(run: Run, dataset: EncodedDataset) -> None:
    losses = {name: run(dataset, steps=1, batch_size=4, **settings).losses[0] for name, settings in SETTINGS.items()}
    losses["none of them"] = run(dataset, steps=1, batch_size=4).losses[0]

    assert len(set(losses.values())) == len(losses), losses


def test_a_range_of_noise_is_trained_and_judged_alone(tiny: Model, dataset: EncodedDataset) -> None:
    config = TrainConfig(min_noise=0.75, rank=2, batch_size=16, validation_draws=4)
    job = plan_job(tiny.denoiser, config)
    assert job.config.noise_range == (0.75, 1.0)
    maker = engine.batch_maker(job.model, dataset.samples, job.config, job.way)
    quantiles = [one for batch in maker.step(0) for one in batch.quantiles]
    assert len(quantiles) == 16 and all(0.75 <= one <= 1 for one in quantiles)
    judge = ValidationWatch(job.model, dataset.samples, job.config, job.way)
    assert bool((judge._losses.quantiles >= 0.75).all()) and judge._losses.quantiles.shape[1] == 4


def test_a_file_named_after_an_expert_is_trained_on_its_range(tiny: Model) -> None:
    experts = (Expert("high_noise", (0.875, 1.0), "transformer"), Expert("low_noise", (0.0, 0.875), "transformer_2"))
    family = copy(tiny.family)
    family.experts = experts
    high = replace(tiny, family=family, path=Path("wan2.2_t2v_high_noise_14B.safetensors"), title="wan")
    job = plan_job(high.denoiser, TrainConfig(rank=2))
    assert job.config.noise_range == (0.875, 1.0)
    assert any("is the high_noise expert of" in note and "0.875 to 1;" in note for note in job.notes)
    whole = plan_job(high.denoiser, TrainConfig(rank=2, min_noise=0.0))
    assert whole.config.noise_range == (0.0, 1.0)
    assert not any("expert" in note for note in whole.notes)
    assert plan_job(replace(high, path=None).denoiser, TrainConfig(rank=2)).config.noise_range == (0.0, 1.0)


def test_a_weighted_squared_error_is_the_same_in_both_objectives(run: Run, dataset: EncodedDataset) -> None:
    one, other = (
        run(dataset, loss_weighting="min_snr", objective=objective, batch_size=2).losses
        for objective in ("native", "x0")
    )

    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_a_zero_terminal_schedule_trains_v_predictions(tiny: Model, dataset: EncodedDataset) -> None:
    assert tiny.components.parameterization == "v"
    config = TrainConfig(zero_terminal_snr=True, timestep_shift=100.0, batch_size=16, training_dtype="fp32", steps=2)
    job = plan_job(tiny.denoiser, config, torch.device("cpu"))
    [batch] = engine.batch_maker(job.model, dataset.samples, job.config, job.way).step(0)

    assert batch.level.alpha.min() == 0  # pure noise is among what it learns
    for weighting in ("none", "soft_min_snr"):
        rescaled, plain = (
            train(tiny, dataset, config=replace(config, loss_weighting=weighting, zero_terminal_snr=zero)).losses
            for zero in (True, False)
        )
        assert all(math.isfinite(loss) for loss in rescaled)
        assert rescaled != plain
