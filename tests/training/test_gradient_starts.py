"""Starts from the gradient: what a function of them gets, and runs that begin there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.adapters.inits import InitLayer, lora_ga
from lorasmith.core.errors import OptionError, OutputError
from lorasmith.data.dataset import EncodedDataset
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.loop import Loop
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable

Run = Callable[..., TrainResult]


@pytest.fixture
def run(quick_run: Run) -> Run:
    return quick_run


def test_a_function_gets_the_gradient_of_the_frozen_model(tiny: Model, dataset: EncodedDataset) -> None:
    seen: dict[str, InitLayer] = {}

    def init(layer: InitLayer) -> tuple[Tensor, Tensor]:
        seen[layer.path] = layer
        return lora_ga(layer)

    own: dict[str, Any] = {"rank": 4, "targets": "*.to_q, *.conv1", "training_dtype": "fp32", "batch_size": 2}
    job = plan_job(tiny.denoiser, TrainConfig(init=init, init_steps=3, weight_change=1.0, steps=1, **own), "cpu")
    engine = engine_of(job)
    loop = Loop(engine, dataset)
    model, batch = job.model, batch_maker(job.model, dataset, job.config, engine.way).step(0)[0]
    with torch.no_grad():
        before = model.predict(batch.noised, batch.level.time, batch.conditioning)
    loop.run()
    assert seen.keys() == job.adapters.keys()

    weights = {path: model.module.get_submodule(path).weight for path in seen}
    maker = batch_maker(model, dataset, job.config, engine.way)
    kind = PARAMETERIZATIONS[model.diffusion.parameterization]
    for weight in weights.values():
        weight.requires_grad_(True)
    for step in range(3):
        for one in maker.step(step):
            prediction = model.predict(one.noised, one.level.time, one.conditioning)
            error = (prediction - kind.target(one.clean, one.noise, one.level)).square().flatten(1).mean(1)
            (error.sum() / 2 / 3).backward()
    for path, weight in weights.items():
        assert weight.grad is not None
        found, expected = seen[path].gradient, weight.grad.flatten(1)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        torch.testing.assert_close(seen[path].weight, weight.detach().flatten(1))
        weight.requires_grad_(False).grad = None

    # Before its first update the model is the frozen one.
    engine.flat.master.zero_()
    engine.flat.publish()
    with engine.prepared(), torch.no_grad():
        after = model.predict(batch.noised, batch.level.time, batch.conditioning)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_lora_ga_is_of_singular_vectors_at_the_stable_scale() -> None:
    gradient = torch.randn(256, 40, generator=torch.Generator().manual_seed(0))
    layer = InitLayer(path="a", weight=gradient, gradient=gradient, rank=3, scale=1.0, seed=0)
    down, up = lora_ga(layer)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    assert (down @ right[:3].T).abs().allclose(torch.eye(3), atol=0.02)  # 256 ** 0.25 / 4 = 1
    assert (left[:, 3:6].T @ up).abs().allclose(torch.eye(3), atol=0.02)


def test_a_run_learns_and_is_told_from_others(
    run: Run, hand_made: Trainable, dataset: EncodedDataset, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"init": "lora-ga", "init_steps": 2, "steps": 4}
    whole = run(dataset, output=tmp_path, **own)
    plain = run(dataset, steps=4)
    assert whole.losses[0] == pytest.approx(plain.losses[0], rel=1e-4) and whole.losses != plain.losses
    for other in ({"init_steps": 3}, {"init": lora_ga}, {"init": None}):
        with pytest.raises(OutputError, match="another run"):
            run(dataset, output=tmp_path, **{**own, **other})
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"]["config"]["init"] == "LoRA-GA"
    trainer = ls.Trainer(hand_made, dataset, **own, **_SMALL)
    assert [step.update().loss for step in trainer] == whole.losses


_SMALL: dict[str, Any] = {
    "rank": 4,
    "training_dtype": "fp32",
    "learning_rate": 1e-3,
    "lora_dtype": "fp32",
    "seed": 3,
    "targets": "*.attn2.to_q",
    "progress": False,
}


def _narrow(layer: InitLayer) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2), torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"init": "svd"}, "init must be one of LoRA-GA"),
        ({"init": _narrow}, r"init must return finite tensors down \(4, \d+\) and up \(\d+, 4\) for .*to_q"),
        ({"init": "LoRA-GA", "init_steps": 0}, "LoRA-GA needs a gradient; set init_steps"),
        ({"init": "LoRA-GA", "algorithm": "LoHa"}, "init is for LoRA, got algorithm LoHa"),
        ({"init": "LoRA-GA", "pissa": True}, "init and pissa are two starts"),
        ({"init": "LoRA-GA", "tlora": "plain"}, "got init, whose start is of all of them"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, dataset: EncodedDataset, settings: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        run(dataset, **settings)
