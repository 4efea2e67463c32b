"""Previews of runs on a GPU leave the frozen weights where steps have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.adapters import frozen_weights
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs import run_previews
from lorasmith.runs.library import train
from lorasmith.training.events import Previewed, Warned
from lorasmith.training.results import TrainResult
from lorasmith.training.way import Way
from tests.covering import slow_except
from tests.hosts import Audience

SETTINGS: dict[str, Any] = {"steps": 3, "rank": 2, "learning_rate": 0.02, "targets": "attention"}
SETTINGS |= {"training_dtype": "fp32", "differences": "biases"}
PREVIEWS: dict[str, Any] = {"previews": "a fox", "preview_every": 1, "preview_steps": 2, "preview_strengths": "0.5"}


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Runs on the CPU draw and offload as on a GPU; how often weights were packed, by event before."""
    made, pack, counted = Way.of, frozen_weights.packed_weight, Counter[str]()

    def packed_weight(*args: Any) -> Any:
        counted["all"] += 1
        return pack(*args)

    def of(config: Any, *args: Any, **settings: Any) -> Way:
        return replace(made(config, *args, **settings), offloading=config.offloading)

    monkeypatch.setattr(Way, "of", of)
    monkeypatch.setattr(frozen_weights, "packed_weight", packed_weight)
    monkeypatch.setattr(run_previews, "_may_stay", lambda plan: True)
    yield counted


@pytest.fixture
def data(captions: list[Conditioning]) -> EncodedDataset:
    g = torch.Generator().manual_seed(0)
    return EncodedDataset(tuple(Sample(torch.randn(4, 8, 8, generator=g), captions[0], f"{n}.png") for n in range(2)))


def trained(model: Model, data: EncodedDataset, folder: Path, **settings: Any) -> tuple[TrainResult, Audience]:
    audience = Audience()
    return train(model, data, output=folder, on_event=audience, **SETTINGS, **settings), audience


def pixels(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    files = sorted((folder / "samples").glob("*-1.png"))
    return {path.name: np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for path in files}


@pytest.mark.parametrize(
    "levers",
    slow_except(
        [
            {"quantization": "int8"},
            {"offloading": True, "offloading_share": 0.5},
            {"quantization": "nf4", "compile": True},
        ],
        {"quantization": "int8"},
    ),
    ids=str,
)
def test_previews_on_the_way_pack_nothing_and_change_nothing(
    tiny: Model, data: EncodedDataset, tmp_path: Path, packings: Counter[str], levers: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.components.denoiser.state_dict().items()}
    plain, _ = trained(tiny, data, tmp_path / "plain", **levers)
    once = packings.total()
    result, audience = trained(tiny, data, tmp_path / "drawn", **PREVIEWS, **levers)
    assert packings.total() - once == 3 * once, "for the base model, the steps, and the finished LoRA"
    assert [event.step for event in audience.events if isinstance(event, Previewed)] == [0, 1, 2, 3, 3]
    assert not [event for event in audience.events if isinstance(event, Warned) and "preview" in event.message]
    assert result.losses == plain.losses
    for path, one in plain.lora.state.adapters.items():
        for name, tensor in one.tensors.items():
            assert torch.equal(result.lora.state.adapters[path].tensors[name], tensor)
    after = tiny.components.denoiser.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    drawn = pixels(tmp_path / "drawn")
    assert not np.array_equal(drawn["base-1.png"], drawn["step-000002-1.png"])
