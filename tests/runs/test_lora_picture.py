from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.formats.container import check_safetensors, write_safetensors
from lorasmith.formats.metadata import sha256_body
from lorasmith.runs.sidecars import THUMBNAIL, give_picture


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "my.dog.safetensors"
    write_safetensors(path, {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)}, {"ss_steps": "3"})
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    info = PngInfo()
    info.add_itxt("parameters", "sks dog")
    path = tmp_path / "shot.png"
    Image.new("RGB", (512, 300), (200, 30, 30)).save(path, pnginfo=info)
    return path


def test_a_lora_has_its_picture_inside_and_beside_it(lora: Path, picture: Path) -> None:
    before = sha256_body(lora)
    give_picture(lora, picture, private=False)
    metadata = check_safetensors(lora).metadata
    start, _, text = metadata[THUMBNAIL].partition(",")
    assert (start, metadata["ss_steps"]) == ("data:image/jpeg;base64", "3")
    with Image.open(io.BytesIO(base64.b64decode(text))) as small:
        assert (small.format, small.size) == ("JPEG", (256, 150))
    assert sha256_body(lora) == before, "tensors and their order stay, and so do the hashes of other programs"
    for name in ("my.dog.png", "my.dog.preview.png"):
        with Image.open(lora.with_name(name)) as shown:
            assert shown.info["parameters"] == "sks dog"


def test_a_private_lora_keeps_no_picture_and_the_files_beside_it_no_prompt(lora: Path, picture: Path) -> None:
    before = lora.read_bytes()
    give_picture(lora, picture, private=True)
    assert lora.read_bytes() == before
    with Image.open(lora.with_name("my.dog.png")) as shown:
        assert shown.size == (512, 300) and "parameters" not in shown.info
