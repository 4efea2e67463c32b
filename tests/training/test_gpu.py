"""The same run on a GPU: the same draws, losses that agree, and nothing left on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.sampling.generate import generate
from lorasmith.training.lora import Lora
from lorasmith.training.train import TrainResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_agree_with_the_cpus(
    run: Callable[..., TrainResult], mixed: EncodedDataset, dtype: str, tolerance: float
) -> None:
    on_cpu, on_gpu = (run(mixed, training_dtype=dtype, batch_size=3, device=one) for one in ("cpu", "cuda"))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=tolerance)


def test_the_model_comes_back_to_the_cpu(
    run: Callable[..., TrainResult], dataset: EncodedDataset, tiny: Model, tmp_path: Path
) -> None:
    result = run(dataset, device="cuda")
    assert {p.device.type for p in tiny.components.denoiser.parameters()} == {"cpu"}
    assert all(t.device.type == "cpu" for one in result.lora.state.adapters.values() for t in one.tensors.values())
    Lora.load(result.lora.save(tmp_path / "lora.safetensors"), tiny)


@pytest.mark.parametrize("bypass", [False, True])
def test_pictures_come_from_the_gpu(
    run: Callable[..., TrainResult], dataset: EncodedDataset, tiny: Model, bypass: bool
) -> None:
    lora = run(dataset, device="cuda").lora
    (image,) = generate(lora.applied_to(tiny.denoiser, bypass=bypass), "a cat", steps=2)
    assert image.size == (64, 64)
