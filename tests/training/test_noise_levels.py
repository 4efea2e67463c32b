"""Settings of noise levels and weights, from `TrainConfig` to the losses of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasmith.app.model_run import train
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.config import TrainConfig
from lorasmith.training.train import TrainResult, plan_job

Run = Callable[..., TrainResult]

SETTINGS: dict[str, dict[str, Any]] = {
    "shifted by size": {"timesteps": "shifted"},
    "shift": {"timestep_shift": 3.0},
    "independent draws": {"stratified": False},
    "min-SNR": {"loss_weighting": "min_snr"},
    "soft min-SNR": {"loss_weighting": "soft_min_snr"},
    "gamma": {"loss_weighting": "min_snr", "min_snr_gamma": 1.0},
    "noise offset": {"noise_offset": 0.1},
}


@pytest.mark.slow
def test_every_setting_makes_another_loss(run: Run, dataset: EncodedDataset) -> None:
    losses = {name: run(dataset, steps=1, batch_size=4, **settings).losses[0] for name, settings in SETTINGS.items()}
    losses["none of them"] = run(dataset, steps=1, batch_size=4).losses[0]

    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.slow
def test_a_batch_of_four_is_four_of_one(run: Run, dataset: EncodedDataset) -> None:
    settings = {"noise_offset": 0.1, "loss_weighting": "min_snr", "timestep_shift": 2.0, "steps": 3}
    together = run(dataset, batch_size=4, **settings)
    apart = run(dataset, batch_size=1, grad_accumulation_steps=4, **settings)

    assert together.losses == pytest.approx(apart.losses, rel=1e-4)


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
    [batch] = engine.batch_maker(tiny.denoiser, dataset.samples, job.config, job.runtime).step(0)

    assert batch.level.alpha.min() == 0  # pure noise is among what it learns
    for weighting in ("none", "soft_min_snr"):
        rescaled, plain = (
            train(tiny, dataset, config=replace(config, loss_weighting=weighting, zero_terminal_snr=zero)).losses
            for zero in (True, False)
        )
        assert all(math.isfinite(loss) for loss in rescaled)
        assert rescaled != plain
