"""Samples on the built-in model, and shorthands for runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lever_cases import flux_model

from lorasmith.app.model_run import train
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.model import Model
from lorasmith.training.memory import activations, host_memory
from lorasmith.training.train import TrainResult

CAPTIONS = ("a cat", "a dog", "a red apple, noto style", "", "a lion", "(a bus:1.3) on a blue background")


@pytest.fixture(scope="session")
def dataset(tiny: Model) -> EncodedDataset:
    """Six samples of random latents with real captions."""
    g = torch.Generator().manual_seed(0)
    return EncodedDataset(
        tuple(
            Sample(torch.randn(4, 8, 8, generator=g), tiny.text_encoder.encode(caption), f"{index}.png")
            for index, caption in enumerate(CAPTIONS)
        )
    )


@pytest.fixture(scope="session")
def mixed(tiny: Model, dataset: EncodedDataset) -> EncodedDataset:
    """Samples of several sizes, one of them with a caption of three chunks."""
    g = torch.Generator().manual_seed(1)
    long = tiny.text_encoder.encode("a penguin on a pink background, " * 20)
    assert long.tensors["context"].shape[1] > 77
    extra = [Sample(torch.randn(4, 8, 12, generator=g), long, "wide.png")]
    extra.append(Sample(torch.randn(4, 8, 8, generator=g), long, "long.png"))
    return EncodedDataset((*dataset.samples, *extra))


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small Flux.1 with random weights."""
    return flux_model(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' activations are below the size from which anything is done about them."""
    monkeypatch.setattr(activations, "_SMALL", 256)
    monkeypatch.setattr(host_memory, "_WORTH_MOVING", 256)


@pytest.fixture
def run(tiny: Model) -> Callable[..., TrainResult]:
    """Train a small LoRA in fp32, everything overridable."""

    def go(data: EncodedDataset, **settings: Any) -> TrainResult:
        base = {"steps": 4, "rank": 4, "training_dtype": "fp32", "learning_rate": 1e-3, "lora_dtype": "fp32", "seed": 3}
        return train(tiny, data, **(base | {"targets": "attention"} | settings))

    return go
