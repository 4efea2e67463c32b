"""Samples on the built-in model, and shorthands for runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lever_cases import flux_model

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training import measured_times
from lorasmith.training.memory import activations
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable
from tests.training.hand_made import HandMade
from tests.training.random_samples import of_one_size, of_several_sizes


@pytest.fixture(scope="session")
def dataset(tiny: Model) -> EncodedDataset:
    """Six samples of random latents with real captions."""
    return of_one_size(tiny)


@pytest.fixture(scope="session")
def mixed(tiny: Model, dataset: EncodedDataset) -> EncodedDataset:
    """Samples of several sizes, one of them with a caption of three chunks."""
    return of_several_sizes(tiny, dataset)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small Flux.1 with random weights."""
    return flux_model(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' activations are below the size from which anything is done about them."""
    monkeypatch.setattr(activations, "_SMALL", 256)
    monkeypatch.setattr(activations, "_WORTH_MOVING", 256)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of measured times of a machine of this test's own."""
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measured_times, "machine_of", lambda device: f"a card, {device}")
    return tmp_path / "cache" / "times.json"


@pytest.fixture(scope="session")
def hand_made(tiny: Model) -> Trainable:
    """Two blocks that read the captions of the built-in model, for tests that are about no model."""
    width = tiny.components.text_encoders["text_encoder"].config.hidden_size
    return Trainable(HandMade(width).requires_grad_(False), diffusion="v", title="hand-made")


@pytest.fixture(scope="session")
def built_in_run(tiny: Model) -> Callable[..., TrainResult]:
    """Train a small LoRA on the built-in model in fp32, everything overridable."""
    return _run_on(tiny)


@pytest.fixture(scope="session")
def run(built_in_run: Callable[..., TrainResult]) -> Callable[..., TrainResult]:
    return built_in_run


@pytest.fixture(scope="session")
def quick_run(hand_made: Trainable) -> Callable[..., TrainResult]:
    """The same on the hand-made denoiser."""
    return _run_on(hand_made)


def _run_on(model: Model | Trainable) -> Callable[..., TrainResult]:
    def go(data: EncodedDataset, **settings: Any) -> TrainResult:
        base = {"steps": 2, "rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "lora_dtype": "fp32", "seed": 3}
        return train(model, data, **(base | {"targets": "*.attn2.to_q"} | settings))

    return go
