"""The denoiser alone: our prediction is ComfyUI's on the same weights and inputs.

The golden files were recorded by `tests/peers/record_comfyui_training.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from original_models import save
from safetensors import safe_open
from torch import Tensor

from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {"sd1": models.SD1_TINY, "flux": models.FLUX_TINY}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_predictions_are_comfyuis(tmp_path: Path, name: str) -> None:
    with safe_open(GOLDEN / f"comfyui_{name}_training.safetensors", framework="pt") as file:
        seed = json.loads(file.metadata()["seeds"])["weights"]
        names = [key for key in file.keys() if key.startswith("forward.")]  # noqa: SIM118 - not a dict
        recorded: dict[str, Tensor] = {name.removeprefix("forward."): file.get_tensor(name) for name in names}
    model = load_model(save(tmp_path / "model.safetensors", models.checkpoint(MODELS[name], seed)))
    expected, x, time = (recorded.pop(key) for key in ("output", "x", "timestep"))

    prediction = model.denoiser.predict(x, time, Conditioning(recorded))

    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
