"""Captions from models of transformers, of every way to be asked; a stranger's folder runs no code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.data import captioners
from lorasmith.data.captioners import load_captioner, transformers_captioner
from tests.covering import slow_except
from tests.data.caption_models import ENDS, MODELS, adapter_elsewhere, code_of_its_own, pickled_weights

CPU = torch.device("cpu")
PICTURES = [Image.new("RGB", size, colour) for size, colour in (((50, 40), "red"), ((31, 64), "blue"))]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    MODELS["git"](tmp_path / "git")
    return tmp_path / "git"


def captioner(folder: Path) -> Any:
    found = transformers_captioner(str(folder), CPU)
    if folder.name == "blip":  # whose decoder has settings of its own, which are not saved
        found._network.text_decoder.generation_config.exponential_decay_length_penalty = ENDS  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("kind", slow_except(MODELS, "git"))
def test_every_kind_says_words_of_its_vocabulary(tmp_path: Path, kind: str) -> None:
    MODELS[kind](tmp_path / kind)
    said = [captioner(tmp_path / kind)(one) for one in PICTURES]
    assert all(
        set(one.split()) <= {"a", "cat", "dog", "red", "apple", "on", "mat", "of", "the", "picture"} for one in said
    )
    assert all(said), "and no prompt, padding or special token"
    assert said == [captioner(tmp_path / kind)(one) for one in PICTURES], "nothing is drawn"


def test_a_caption_without_an_end_is_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "_MAX_NEW_TOKENS", 6)
    with pytest.raises(ValueError, match="does not end within 6 tokens"):
        transformers_captioner(str(model), CPU)(PICTURES[0])


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
    model: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nor is it asked whether to run code
    damage(model)
    with pytest.raises(ModelError, match=r"without code of its own|is an adapter on another one"):
        transformers_captioner(str(model), CPU)
    assert "evil" not in sys.modules


def test_code_beside_a_known_kind_is_not_run(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    code_of_its_own(model)
    changed = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**changed, "model_type": config["model_type"]}))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("raise SystemExit('code of a folder was run')")
    try:
        said = transformers_captioner(str(model), CPU)(PICTURES[0])
    except ModelError:
        return
    assert said


def test_kernels_that_a_configuration_names_are_not_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        pytest.fail("a file reached out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    config = json.loads((model / "config.json").read_text())
    for part in (config, config["vision_config"]):
        part["attn_implementation"] = part["_attn_implementation"] = "somebody/kernel"
    (model / "config.json").write_text(json.dumps(config))
    assert transformers_captioner(str(model), CPU)(PICTURES[0])


def test_chat_models_are_asked_for_what_is_requested(tmp_path: Path) -> None:
    MODELS["llava"](tmp_path / "llava")
    asked = load_captioner(str(tmp_path / "llava"), CPU, request="a dog")
    said = [one._inputs(PICTURES[0])["input_ids"] for one in (asked, load_captioner(str(tmp_path / "llava"), CPU))]  # type: ignore[attr-defined]
    decoder = asked._processor  # type: ignore[attr-defined]
    assert "a dog" in decoder.batch_decode(said[0])[0] and "a dog" not in decoder.batch_decode(said[1])[0]
    assert isinstance(asked(PICTURES[0]), str)
    MODELS["blip"](tmp_path / "blip")
    with pytest.raises(OptionError, match="takes no request; leave it out, or use a chat model with vision"):
        load_captioner(str(tmp_path / "blip"), CPU, request="a dog")


def test_a_model_that_is_not_there() -> None:
    for name in ["owner/name-that-is-nowhere", "owner/../name", "nowhere"]:
        with pytest.raises(ModelError, match=r"download it first, with: hf download|check the spelling"):
            transformers_captioner(name, CPU)
