"""`lorasmith data cache`, and what docs/data.md says of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.data.encoding_cache import default_cache, key_of

Command = Callable[..., Any]
ENCODER = key_of(encoder=1)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two encodings of an encoder with a name that a terminal would obey; the folder of the cache."""
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    with default_cache().entries(ENCODER, title="sdxl\x1b[31m vae") as entries:
        for number in range(2):
            entries.put(key_of(number=number), {"latents": torch.zeros(1000)})
    return tmp_path / "cache"


def test_list_shows_entries_size_and_last_use(lorasmith: Command, filled: Path) -> None:
    ran = lorasmith("data", "cache", "list")
    assert ran.code == 0, ran.err
    assert f"sdxl\\u001b[31m vae ({ENCODER[:8]})" in ran.out and "\x1b[31m" not in ran.out
    assert "0 hours ago" in ran.out and f"in {filled / 'encodings'}" in ran.out
    (path,) = filled.rglob("*.safetensors")
    path.with_name(f"{9:020}-{'0' * 16}.safetensors").write_bytes(b"torn")
    then = time.time() - 5 * 86400
    for one in path.parent.iterdir():
        os.utime(one, (then, then))
    ran = lorasmith("data", "cache", "list")
    assert "2 and 1 unreadable files" in ran.out and "5 days ago" in ran.out


def test_list_as_json(lorasmith: Command, filled: Path) -> None:
    found = json.loads(lorasmith("data", "cache", "list", "--json").out)
    assert found["folder"] == str(filled / "encodings")
    (encoder,) = found["encoders"]
    assert encoder["encoder"] == ENCODER and encoder["entries"] == 2
    assert encoder["size_bytes"] == found["size_bytes"] > 8000


def test_clear_removes_all_or_what_is_old(lorasmith: Command, filled: Path) -> None:
    assert "Removed 0 files" in lorasmith("data", "cache", "clear", "--older-than", 1).out
    assert list(filled.rglob("*.safetensors"))
    assert "Removed 1 files" in lorasmith("data", "cache", "clear").out
    assert not list(filled.rglob("*.safetensors"))
    assert "0 MiB in" in lorasmith("data", "cache", "list").out
