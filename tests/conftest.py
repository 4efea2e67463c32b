"""What many rooms' tests share: the built-in model, and no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere

import pytest
import torch
from hypothesis import settings

from lorasmith.families.base import Conditioning
from lorasmith.families.loading import BUILT_IN, load_model
from lorasmith.families.model import Model

# Examples are counted, not timed: a busy machine makes no test fail.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The model that comes with the package, in fp32. Nothing may change it."""
    return load_model(BUILT_IN, dtype=torch.float32)


@pytest.fixture(scope="session")
def captions(tiny: Model) -> list[Conditioning]:
    """Three prompts, encoded."""
    with tiny.text_encoder.active():
        return [tiny.text_encoder.encode(text) for text in ("a fox", "a red bus", "a green tree")]
