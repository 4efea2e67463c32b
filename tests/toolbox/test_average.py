"""Averages over a run of any length, of those it has saved, against the mean of the LoRA of every step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.core.errors import LoraError, OutputError
from lorasmith.core.power_average import AVERAGES, exponent, profile
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.toolbox.average import average_run
from lorasmith.training.lora_handle import Lora
from tests.training.random_samples import of_one_size

STEPS = 24
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "rank": 2,
    "targets": "*.attn2.to_q, *.resnets.0.conv1",
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "learning_rate": 1e-2,
    "post_hoc_ema": 6,
    "previews": "",
}


def trained(model: Model, folder: Path, **settings: Any) -> Path:
    train(model, of_one_size(model), output=folder, title="dog", **(SETTINGS | settings))
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps the LoRA of every step."""
    return trained(tiny, tmp_path_factory.mktemp("run") / "dog", save_every=1)


def by_step(run: Path) -> list[Mapping[str, Tensor]]:
    return [load_file(run / f"dog-step{step:08}.safetensors") for step in range(1, STEPS)] + [
        load_file(run / "dog.safetensors")
    ]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("sigma_rel", [0.05, 0.08, 0.1])
def test_it_is_the_weighted_mean_of_all_steps(whole: Path, tiny: Model, tmp_path: Path, sigma_rel: float) -> None:
    done = average_run(whole, tmp_path / "average.safetensors", sigma_rel=sigma_rel)
    found, steps = load_file(done.output), by_step(whole)
    weights = profile(STEPS, exponent(sigma_rel), STEPS)

    assert (done.step, done.saved, done.missing) == (STEPS, 12, ())
    for name, tensor in found.items():
        if not name.endswith(".alpha"):
            expected = sum(float(weight) * one[name] for weight, one in zip(weights, steps, strict=True))
            spread = max(float((one[name] - expected).abs().max()) for one in steps)
            assert float((tensor - expected).abs().max()) < 0.02 * spread + 1e-7
    lora = Lora.load(done.output, tiny)
    assert lora.steps == STEPS
    assert "average of length" in lora.metadata["lorasmith.history"]
    assert lora.applied(tiny.denoiser, None).note == ""


def test_what_is_missing_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    exact = average_run(tmp_path / "run", tmp_path / "all.safetensors", sigma_rel=0.08)
    next((tmp_path / "run" / AVERAGES).glob("*step00000020-ema0.05*")).unlink()
    found = average_run(tmp_path / "run", tmp_path / "fewer.safetensors", sigma_rel=0.08)

    assert (found.missing, found.saved) == ((20,), 11)
    assert found.error > exact.error
    with pytest.raises(OutputError, match="exists already"):
        average_run(tmp_path / "run", tmp_path / "fewer.safetensors", sigma_rel=0.08)
    shutil.rmtree(tmp_path / "run" / AVERAGES)
    with pytest.raises(LoraError, match="has no averages over training; train with --post-hoc-ema 8"):
        average_run(tmp_path / "run", tmp_path / "none.safetensors", sigma_rel=0.08)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("settings", [{"lora_dtype": "bf16"}, {"tlora": "orthogonal"}], ids=["bf16", "with a start"])
def test_other_files_are_averaged_too(tiny: Model, tmp_path: Path, whole: Path, settings: dict[str, Any]) -> None:
    run = trained(tiny, tmp_path / "dog", steps=8, post_hoc_ema=4, save_every=1, **settings)
    done = average_run(run, tmp_path / "average.safetensors", sigma_rel=0.1)
    weights = profile(8, exponent(0.1), 8)
    files = [load_file(run / f"dog-step{step:08}.safetensors") for step in range(1, 8)] + [
        load_file(run / "dog.safetensors")
    ]
    for name, tensor in load_file(done.output).items():
        if not name.endswith(".alpha"):
            assert tensor.dtype == (torch.bfloat16 if "lora_dtype" in settings else torch.float32)
            expected = sum(float(weight) * one[name].double() for weight, one in zip(weights, files, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-2, atol=1e-3)
