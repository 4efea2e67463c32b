from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import OptionError
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Autoencoder, Model, TextEncoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    return tmp_path


def test_both_encoders_work_on_the_device_that_is_named(
    folder: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for kind in (TextEncoder, Autoencoder):

        def listen(self: object, device: torch.device | None = None, active: object = kind.active) -> object:
            seen.append((type(self), device))
            return active(self, device)  # type: ignore[operator]

        monkeypatch.setattr(kind, "active", listen)
    load_dataset(folder, tiny, resolution=64, device="cpu")
    assert seen == [(TextEncoder, torch.device("cpu")), (Autoencoder, torch.device("cpu"))]


def test_a_device_that_is_not_here_is_refused(folder: Path, tiny: Model) -> None:
    with pytest.raises(OptionError, match="device must be one that is here"):
        load_dataset(folder, tiny, device="gpu")
