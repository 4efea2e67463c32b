"""Captions from models of transformers, of every way to be asked; a stranger's folder runs no code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import ModelError
from lorasmith.data.captioners import transformers_captioner
from tests.covering import slow_except
from tests.data.caption_models import MODELS, adapter_elsewhere, code_of_its_own, pickled_weights

CPU = torch.device("cpu")
PICTURES = [Image.new("RGB", size, colour) for size, colour in (((50, 40), "red"), ((31, 64), "blue"))]


@pytest.fixture
def blip(tmp_path: Path) -> Path:
    MODELS["blip"](tmp_path / "blip")
    return tmp_path / "blip"


@pytest.mark.parametrize("kind", slow_except(MODELS, "blip"))
def test_every_kind_says_words_of_its_vocabulary(tmp_path: Path, kind: str) -> None:
    MODELS[kind](tmp_path / kind)
    said = [transformers_captioner(str(tmp_path / kind), CPU)(one) for one in PICTURES]
    assert all(
        set(one.split()) <= {"a", "cat", "dog", "red", "apple", "on", "mat", "of", "the", "picture"} for one in said
    )
    assert all(said), "and no prompt, padding or special token"
    assert said == [transformers_captioner(str(tmp_path / kind), CPU)(one) for one in PICTURES], "nothing is drawn"


def torn(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"torn")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize(
    "damage", [code_of_its_own, pickled_weights, adapter_elsewhere, torn, no_config, language_model]
)
def test_what_is_no_such_model_is_a_sentence(
    blip: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nor is it asked whether to run code
    damage(blip)
    with pytest.raises(ModelError, match=r"without code of its own|is an adapter on another one"):
        transformers_captioner(str(blip), CPU)
    assert "evil" not in sys.modules


def test_code_beside_a_known_kind_is_not_run(blip: Path) -> None:
    config = json.loads((blip / "config.json").read_text())
    code_of_its_own(blip)
    changed = json.loads((blip / "config.json").read_text())
    (blip / "config.json").write_text(json.dumps({**changed, "model_type": config["model_type"]}))
    (blip / "custom_generate").mkdir()
    (blip / "custom_generate" / "generate.py").write_text("raise SystemExit('code of a folder was run')")
    try:
        said = transformers_captioner(str(blip), CPU)(PICTURES[0])
    except ModelError:
        return
    assert said


def test_kernels_that_a_configuration_names_are_not_fetched(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        pytest.fail("a file reached out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    config = json.loads((blip / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["attn_implementation"] = part["_attn_implementation"] = "somebody/kernel"
    (blip / "config.json").write_text(json.dumps(config))
    assert transformers_captioner(str(blip), CPU)(PICTURES[0])


@pytest.mark.parametrize("name", ["owner/name-that-is-nowhere", "owner/../name", "nowhere"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=r"download it first, with: hf download|check the spelling"):
        transformers_captioner(name, CPU)
