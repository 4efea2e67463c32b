"""One training step on tiny models of two families, with whatever memory levers: what the tests of levers share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.core.placement import memory_format_for
from lorasmith.core.quantization import packed
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.training import engine
from lorasmith.training.config import ResolvedConfig, TrainConfig
from lorasmith.training.engine import prepared, sample_losses
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.way import Way

CPU = torch.device("cpu")

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "DoRA per input": {"dora": "input"},
    "DoRA per output": {"dora": "output"},
    "rsLoRA": {"rslora": True},
    "PiSSA": {"pissa": True},
    "Tucker": {"tucker": True},
    "T-LoRA": {"tlora": "plain"},
    "orthogonal T-LoRA": {"tlora": "orthogonal"},
    "LoRA+": {"lora_plus_ratio": 16.0},
    "dropout": {"rank_dropout": 0.3, "module_dropout": 0.1},
    "norms and biases": {"differences": "norms+biases"},
}
"""Every algorithm, and what changes the kind of a LoRA."""


def flux_model(folder: Path) -> Model:
    path = folder / "flux.safetensors"
    save_file(models.tiny_flux_checkpoint(0), path)
    return load_model(path)


def flux_dataset() -> EncodedDataset:
    shape = models.FLUX_TINY

    def sample(index: int) -> Sample:
        context = models.seeded("context", (1, 8, shape.context), seed=index)
        pooled = models.seeded("pooled", (1, shape.pooled), seed=index)
        tensors = {"context": context, "pooled": pooled, "guidance": torch.full((1,), 3.5)}
        return Sample(models.seeded("latents", (16, 8, 8), seed=index), Conditioning(tensors), f"{index}")

    return EncodedDataset(tuple(sample(index) for index in range(4)))


@contextlib.contextmanager
def rounded(model: nn.Module, kind: str) -> Iterator[None]:
    """The model with the weights that `kind` unpacks to, as plain parameters."""
    originals = [(layer.get_parameter("weight"), layer.weight.data) for layer in packable_layers(model)]
    for weight, original in originals:
        wanted = memory_format_for(model) if original.ndim == 4 else torch.preserve_format
        weight.data = packed(original.to(memory_format=wanted), kind, original.dtype).weight()
    yield
    for weight, original in originals:
        weight.data = original


def resolved(**settings: Any) -> ResolvedConfig:
    """Settings with nothing left open."""
    decided = {"learning_rate": 1e-3, "alpha": 1.0, "targets": "all", "schedule": "constant", "timesteps": "uniform"}
    decided |= {"min_noise": 0.0, "max_noise": 1.0}
    return ResolvedConfig(**(decided | {"training_dtype": "fp32"} | settings))


def planned(model: Model, **settings: Any) -> TrainJob:
    config = TrainConfig(**({"rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "batch_size": 2} | settings))
    return plan_job(model.denoiser, config, CPU)


def randomise(adapter: Adapter, *, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=g).to(parameter.dtype)


def one_step(
    model: Model,
    data: EncodedDataset,
    changes: dict[str, Any] | None = None,
    *,
    job: TrainJob | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Losses and gradients of one step, by name.

    Args:
        changes: to way and settings, behind the plan.
        job: planned before, instead of from the settings.
    """
    job = planned(model, **settings) if job is None else job
    own = {field.name for field in fields(Way)}
    way = replace(job.way, **{name: value for name, value in (changes or {}).items() if name in own})
    config = replace(job.config, **{name: value for name, value in (changes or {}).items() if name not in own})
    for number, adapter in enumerate(job.adapters.values()):  # no longer the identity
        randomise(adapter, seed=number)
    for one in (*job.adapters.values(), *job.differences.values()):
        one.to(way.dtype)
    maker = engine.batch_maker(job.model, data.samples, config, way)
    with prepared(job.model, job.adapters, config, way, job.differences):
        loss = sample_losses(job.model, maker.step(0)[0], config, way)
        loss.sum().backward()
    trained = [*job.adapters.items(), *job.differences.items()]
    named = ((f"{path}.{name}", p) for path, one in trained for name, p in one.named_parameters())
    return {"loss": loss.detach()} | {name: p.grad for name, p in named if p.grad is not None}
