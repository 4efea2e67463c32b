"""A step with methods beside the same loss in plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.data.dataset import EncodedDataset
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.batches import Batch
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.trainable import Trainable

Predict = Callable[[Conditioning], Tensor]
Reference = Callable[[Batch, Predict, Predict, Tensor], Tensor]
"""(batch, trained, frozen, target) → the loss of each sample."""


def gradients(
    model: Model | Trainable, data: EncodedDataset, reference: Reference, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradient of a step, and those of a reference, with adapters that are not the identity."""
    plain = {"rank": 4, "training_dtype": "fp32", "targets": "*attn*", "batch_size": 4}
    job = plan_job(model.denoiser if isinstance(model, Model) else model, TrainConfig(**(plain | settings)), "cpu")
    engine: Engine = engine_of(job)
    random = torch.randn(len(engine.flat.master), generator=torch.Generator().manual_seed(0))
    engine.flat.master.add_(random * 0.02)
    (batch,) = batch_maker(job.model, data, job.config, engine.way).step(0)
    with engine.prepared():
        losses, _ = engine.gradient([batch])
    whole = engine.flat.grad.clone()
    engine.flat.zero()

    def frozen(conditioning: Conditioning, noised: Tensor = batch.noised) -> Tensor:
        with torch.no_grad():
            return job.model.predict(noised, batch.level.time, conditioning)

    def trained(conditioning: Conditioning, strength: float = 1.0, noised: Tensor = batch.noised) -> Tensor:
        with adapters_attached(job.model.module, [Attached(job.adapters, strength)]):
            return job.model.predict(noised, batch.level.time, conditioning)

    kind = PARAMETERIZATIONS[job.model.diffusion.parameterization]
    target = kind.target(batch.clean, batch.noise, batch.level)
    with job.model.frozen(job.config, engine.way):
        expected = reference(batch, trained, frozen, target)
        expected.sum().div(job.config.samples_per_step).backward()
    engine.flat.collect()
    return losses, whole, expected.detach(), engine.flat.grad.clone()


def check(found: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    losses, gradient, expected, reference = found
    assert float(reference.norm()) > 0
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def mean(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
