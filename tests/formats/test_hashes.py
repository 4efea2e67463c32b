from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch

from lorasmith.formats.container import write_safetensors
from lorasmith.formats.metadata import autov1, autov2, autov3, sha256_body, sha256_file, sshs_hashes

TENSORS = {
    "b": torch.linspace(0, 1, 400_000).half(),
    "a": torch.linspace(0, 1, 400_000),
    "c": torch.tensor(4.0),
}
METADATA = {"ss_steps": "10", "other": "x" * 100, "ss_name": "ünï"}


def test_hashes_are_over_the_bytes_of_the_reference_writer(tmp_path: Path) -> None:
    kept = {key: value for key, value in METADATA.items() if key.startswith("ss_")}
    reference = safetensors.torch.save(TENSORS, kept)
    start = 8 + int.from_bytes(reference[:8], "little")
    hashes = sshs_hashes(TENSORS, METADATA)
    assert hashes == {
        "sshs_model_hash": hashlib.sha256(reference[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(reference[0x100000:0x110000]).hexdigest()[:8],
    }
    assert hashes == sshs_hashes(dict(reversed(TENSORS.items())), {**METADATA, "other": "y"})
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, METADATA)
    content = path.read_bytes()
    assert sha256_body(path) == hashes["sshs_model_hash"]
    assert autov3(path) == hashes["sshs_model_hash"][:12]
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert autov2(path) == sha256_file(path)[:10]
    assert autov1(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_small_files_have_the_hash_of_nothing_as_autov1(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(1)})
    assert autov1(path) == hashlib.sha256(b"").hexdigest()[:8]
    assert sshs_hashes({"a": torch.zeros(1)}, {})["sshs_legacy_hash"] == autov1(path)
