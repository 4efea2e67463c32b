from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from lorasmith.data.dataset import EncodedCaptions, _conditioning
from lorasmith.data.encoding_cache import CacheEntries, EncodingCache
from lorasmith.families.conditionings import Conditioning

DIGEST = "0" * 64


class Encoder:
    """A text encoder that is ready only in its context, and has masks."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_ready = False
        self.times_ready = 0

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        self.is_ready, self.times_ready = True, self.times_ready + 1
        yield
        self.is_ready = False

    def encode(self, text: str) -> Conditioning:
        assert self.is_ready
        self.texts.append(text)
        tokens = torch.full((1, len(text) or 1, 4), float(len(text)))
        return Conditioning({"context": tokens, "pooled": tokens[:, 0]}, text, torch.ones(1, len(text) or 1).bool())


def test_captions_are_encoded_once_in_their_order_with_the_encoder_ready_once() -> None:
    encoder, seen = Encoder(), []
    captions = EncodedCaptions(encoder.encode, ready=encoder.ready, encoder_bytes=5)
    captions.encode_ahead(["b", "aa", "b"], lambda *call: seen.append(call))
    captions.encode_ahead(["aa"])
    assert encoder.texts == ["b", "aa"] and encoder.times_ready == 1 and captions.encoded == 2
    assert seen == [(1, 2), (2, 2)]
    assert captions["aa"] is captions["aa"] and captions["aa"].text == "aa"
    assert captions.bytes_each == 2 * 4 * 4 + 4 * 4
    assert EncodedCaptions(encoder.encode, memory_bytes=100).most == 100, "before the first one a byte is assumed"


def test_what_was_not_encoded_ahead_is_encoded_when_it_is_drawn_and_not_kept() -> None:
    encoder = Encoder()
    captions = EncodedCaptions(encoder.encode, ready=encoder.ready)
    with captions.staying():
        threads = [threading.Thread(target=captions.__getitem__, args=("a",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert encoder.texts == ["a"] * 3 and encoder.times_ready == 1


def test_conditionings_come_back_from_the_cache_without_an_encoder(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, limit_bytes=2**20)

    def entries() -> contextlib.AbstractContextManager[CacheEntries]:
        return cache.entries(DIGEST)

    first, second = Encoder(), Encoder()
    before = EncodedCaptions(first.encode, ready=first.ready, entries=entries)
    before.encode_ahead(["a", "bb", ""])
    after = EncodedCaptions(second.encode, ready=second.ready, entries=entries)
    after.encode_ahead(["bb", "", "a"])
    assert second.times_ready == 0 and after.encoded == 0
    for text in ("a", "bb", ""):
        one, other = before[text], after[text]
        assert other.text == text and one.tensors.keys() == other.tensors.keys() and one.span == other.span
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        assert one.mask is not None and other.mask is not None and torch.equal(one.mask, other.mask)
    after.encode_ahead(["a", "new"])
    assert second.texts == ["new"]


def test_a_forged_entry_without_tensors_of_a_conditioning_is_none() -> None:
    assert _conditioning("a dog", {"other": torch.zeros(1)}) is None
    assert _conditioning("a dog", {}) is None
