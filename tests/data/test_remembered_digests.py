"""A file is hashed again only if it changed. `test_encoder_digest` has what is remembered of encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.data import encoder_digest
from lorasmith.data.encoder_digest import RememberedDigests, file_sha256
from lorasmith.data.encoding_cache import EncodingCache
from lorasmith.formats.metadata import sha256_file


def test_a_file_is_hashed_once_as_long_as_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path, *, each_block: Callable[[], object]) -> str:
        hashed.append(path)
        return sha256_file(path, each_block=each_block)

    monkeypatch.setattr(encoder_digest, "sha256_file", counted)
    monkeypatch.setattr(encoder_digest, "_SETTLED_NS", 0)
    file = tmp_path / "model.safetensors"

    def digest() -> str:
        # As another process has it.
        remembered = RememberedDigests(EncodingCache(tmp_path / "cache", limit_bytes=1))
        return file_sha256(file, remembered, each_block=lambda: None)

    file.write_bytes(b"weights")
    assert {digest() for _ in range(3)} == {sha256_file(file)}
    assert hashed == [file]
    file.write_bytes(b"others.")
    assert digest() == sha256_file(file)
    assert len(hashed) == 2
    monkeypatch.setattr(encoder_digest, "_SETTLED_NS", 60 * 10**9)
    assert digest() == digest()
    assert len(hashed) == 4, "a file that has just changed may change again within the clock's steps"


def test_digests_behind_links_are_not_read(tmp_path: Path) -> None:
    remembered = RememberedDigests(EncodingCache(tmp_path / "cache", limit_bytes=1))
    remembered.keep("a" * 64, "b" * 64)
    assert remembered.find("a" * 64) == "b" * 64
    file = remembered.folder / f"{'a' * 64}.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert remembered.find("a" * 64) is None
