"""What many rooms' tests share: the built-in model, and no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere

import pytest
from hypothesis import settings

from lorasmith.families.base import Conditioning
from lorasmith.families.loading import BUILT_IN, load_model
from lorasmith.families.model import Model
from tests.covering import cases

# Examples are counted, not timed: a busy machine makes no test fail.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases of `pairwise` marks; the slow ones are made only where slow tests are wanted, for making them takes time."""
    axes = {name: axis for mark in metafunc.definition.iter_markers("pairwise") for name, axis in mark.kwargs.items()}
    if axes:
        slow_wanted = "not slow" not in metafunc.config.getoption("markexpr")
        metafunc.parametrize(tuple(axes), cases(axes, full=slow_wanted))


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The model that comes with the package. Nothing may change it."""
    return load_model(BUILT_IN)


@pytest.fixture(scope="session")
def captions(tiny: Model) -> list[Conditioning]:
    """Three prompts, encoded."""
    with tiny.text_encoder.active():
        return [tiny.text_encoder.encode(text) for text in ("a fox", "a red bus", "a green tree")]
