"""Base models come from the disk: nothing here may reach for the network, not even to give up on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sdxl_models
from transformer_models import TINY, Case

from lorasmith.families.loading import load_model
from lorasmith.families.model import Model


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of code that families share run by default for Flux, Z-Image and Wan alone; see `TinyFamily.is_slow`."""
    for item in items:
        if item.get_closest_marker("slow_by_family") and TINY[item.callspec.params["case"]].is_slow:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion XL in the original layout."""
    return sdxl_models.saved_checkpoint(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl.safetensors")


@pytest.fixture(scope="session")
def sdxl(sdxl_file: Path) -> Model:
    """It as loaded. Nothing may change it."""
    return load_model(sdxl_file)


@pytest.fixture(scope="session", params=TINY)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each transformer family, small, in files of their usual names. Nothing may change the model."""
    TINY[request.param].parts()  # which most tests compare with
    yield Case.of(request.param, tmp_path_factory.mktemp(request.param))
    TINY[request.param].forget()
