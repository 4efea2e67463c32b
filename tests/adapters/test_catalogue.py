"""The catalogue's words and the registry's classes are about the same algorithms."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from lorasmith.adapters import inject  # noqa: F401  registers every algorithm
from lorasmith.adapters.adapter import ADAPTERS
from lorasmith.adapters.catalogue import ALGORITHMS, rank_words
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.core.options import options_of
from lorasmith.training.config import TrainConfig


def test_catalogue_and_registry_agree() -> None:
    assert set(ALGORITHMS) == set(ADAPTERS)
    for name, facts in ALGORITHMS.items():
        assert ADAPTERS[name].algorithm == name.casefold()
        assert not ("dora" in facts.variants and ADAPTERS[name].transforms_output)  # which adds nothing to the weight
        assert facts.variants | facts.unused <= options_of(TrainConfig).keys()
        assert facts.summary[0].isupper() and facts.summary.count(".") == 1 and facts.summary.endswith(".")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_that_are_said_to_be_unused_are(name: str) -> None:
    layer = FrozenLayer(nn.Linear(16, 16))

    def start(**changed: object) -> list[list[float]]:
        settings = {"rank": 4, "alpha": 1.0, "zero": "up"} | changed
        weights = ADAPTERS[name].create(layer, seed=0, path="a", **settings).to_weights()
        return [tensor.tolist() for tensor in weights.tensors.values()]

    changes = {"rank": {"rank": 2}, "zero_init": {"zero": "down"}}
    for setting, changed in changes.items():
        assert (start() == start(**changed)) == (setting in ALGORITHMS[name].unused)


@pytest.mark.parametrize(
    ("name", "rank", "words"),
    [
        ("lora", 8, "rank 8"),
        ("LoKr", 8, "factor 8"),
        ("OFT", 8, "block size 8"),
        ("boft", None, "block size"),
        ("Full", 8, ""),
    ],
)
def test_rank_is_called_what_it_is(name: str, rank: int | None, words: str) -> None:
    assert rank_words(name, rank) == words


def test_help_texts_cost_no_torch() -> None:
    code = "import sys, lorasmith.training.config, lorasmith.cli.models; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
