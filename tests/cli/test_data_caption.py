"""`lorasmith data caption`, with a model from a folder and with a captioner of another package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.data.caption_models import MODELS
from tests.installed import install

Command = Callable[..., Any]
CALLS: list[str] = []


def parrot(model: str, device: torch.device) -> Callable[[Image.Image], str]:
    """Says its argument; stops at the second picture if it is `stop`."""
    CALLS.clear()

    def say(image: Image.Image) -> str:
        CALLS.append(model)
        if model == "fail":
            raise ValueError("no\x1b[31m")
        if model == "stop" and len(CALLS) == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return "" if model == "silent" else model

    return say


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("packages")
    install(monkeypatch, place, {"parrots": {"captioners": {"parrot": f"{__name__}:parrot"}}})


def captions(photos: Path) -> dict[str, str]:
    return {path.name: path.read_bytes().decode("latin-1") for path in sorted(photos.glob("*.txt"))}


def test_a_model_captions_the_images_that_have_none(lorasmith: Command, photos: Path, tmp_path: Path) -> None:
    MODELS["git"](tmp_path / "models" / "captioners" / "mine")
    before = captions(photos)
    named = ("--with", "mine", "--base-dir", tmp_path)
    ran = lorasmith("data", "caption", photos, *named, "--trigger", "sks cat", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "2 images have a caption, which is kept" in ran.out and "2 captions are written" in ran.out
    after = captions(photos)
    assert after.items() > before.items() and after.keys() - before.keys() == {"2.txt", "3.txt"}
    assert all(after[name].startswith("sks cat, ") for name in ("2.txt", "3.txt"))
    again = lorasmith("data", "caption", photos, "--with", "nothing that is loaded")
    assert again.code == 0 and "4 images have a caption" in again.out
    assert captions(photos) == after


def test_one_of_another_package_replaces_captions(lorasmith: Command, photos: Path) -> None:
    ran = lorasmith("data", "caption", photos, "--with", "parrot:a red cat", "--overwrite")
    assert ran.code == 0, ran.err
    assert set(captions(photos).values()) == {"a red cat\n"} and len(captions(photos)) == 4


def test_ctrl_c_keeps_what_is_written(lorasmith: Command, photos: Path) -> None:
    ran = lorasmith("data", "caption", photos, "--with", "parrot:stop", "--overwrite")
    assert ran.code == 130
    assert "2 captions are written and 2 images are left; the same command captions them" in ran.err
    assert [text == "stop\n" for text in captions(photos).values()] == [True, True]


@pytest.mark.parametrize(
    ("model", "said"),
    [("parrot:fail", "makes the captioner fail (ValueError: no\\u001b[31m)"), ("parrot:silent", "says nothing of it")],
)
def test_what_fails_is_named(lorasmith: Command, photos: Path, model: str, said: str) -> None:
    before = captions(photos)
    ran = lorasmith("data", "caption", photos, "--with", model)
    assert ran.code == 1 and "no caption was written" in ran.err
    assert ran.out.count(said) == 2 and "2.png" in ran.out and "\x1b[31m" not in ran.out
    assert captions(photos) == before


def test_what_is_wrong_is_a_sentence(lorasmith: Command, photos: Path, tmp_path: Path) -> None:
    ran = lorasmith("data", "caption", photos, "--with", "parot")
    assert ran.code == 1 and "name one of transformers, parrot" in ran.err
    ran = lorasmith("data", "caption", tmp_path / "nowhere", "--with", "parrot")
    assert ran.code == 1 and "does not exist; check the path" in ran.err
