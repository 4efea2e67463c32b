"""Captioners are found by name, by a model's folder, and in other packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.data.captioners import CAPTIONERS, caption_request, load_captioner
from lorasmith.families.base import FAMILIES
from tests.installed import install

CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (8, 8))


def loud(model: str, device: torch.device) -> Any:
    return lambda image: f"{model} {device} {image.size}"


def broken(model: str, device: torch.device) -> Any:
    raise KeyError("no such thing")


def says_why(model: str, device: torch.device) -> Any:
    raise DataError("it must be Tuesday; wait")


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Captioners of another package, one of which cannot be imported."""
    found = {one.__name__: f"{__name__}:{one.__name__}" for one in (loud, broken, says_why)} | {"gone": "no_module:x"}
    install(monkeypatch, tmp_path, {"captions": {"captioners": found}})


def test_one_of_another_package() -> None:
    for wanted, said in [("loud", " cpu (8, 8)"), ("loud:", " cpu (8, 8)"), ("loud:a/b:c", "a/b:c cpu (8, 8)")]:
        assert load_captioner(wanted, CPU)(PICTURE) == said
        assert set(CAPTIONERS) == {"broken", "gone", "loud", "says_why", "transformers"}


@pytest.mark.parametrize("wanted", ["{folder}", "transformers:{folder}", "owner/name", "transformers:owner/name"])
def test_a_folder_or_an_id_means_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setitem(CAPTIONERS._things, "transformers", loud)
    folder = tmp_path / "odd:name"
    folder.mkdir()
    model = wanted.format(folder=folder)
    assert load_captioner(model, CPU)(PICTURE) == f"{model.removeprefix('transformers:')} cpu (8, 8)"


def test_a_family_says_how_a_captioner_is_asked_for_its_captions() -> None:
    asked = caption_request("ideogram4")
    assert all(f'"{key}"' in asked for key in FAMILIES["ideogram4"].caption_keys)
    assert caption_request("Which colours?") == "Which colours?"
    with pytest.raises(OptionError, match=r"Flux\.1 takes captions as plain text; leave the request out"):
        caption_request("flux1")
    with pytest.raises(OptionError, match="the captioner loud takes no request; leave it out, or use a chat model"):
        load_captioner("loud", CPU, request="Which colours?")


def test_what_cannot_be_loaded_is_a_sentence() -> None:
    with pytest.raises(OptionError, match="no captioner and no model's folder is called 'loude'; name one of"):
        load_captioner("loude", CPU)
    with pytest.raises(ModelError, match=r"the captioner broken cannot be loaded .*no such thing"):
        load_captioner("broken", CPU)
    with pytest.raises(ModelError, match=r"the captioner 'gone' of captions 0.1 cannot be used .*no_module"):
        load_captioner("gone", CPU)
    with pytest.raises(DataError, match="it must be Tuesday"):
        load_captioner("says_why", CPU)
    with pytest.raises(ModelError, match="must be a folder of transformers or a hub id, got ''"):
        load_captioner("transformers", CPU)
