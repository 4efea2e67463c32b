"""Conditionings of captions, encoded on demand or all ahead of a run.

A run draws finitely many texts where its captions have few variants, and at most one per draw otherwise, so most runs
encode every caption ahead and need no text encoder while they train. Where the conditionings would exceed a given
amount of memory, the text encoder stays loaded, and captions are encoded when they are drawn. Both give the same run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from lorasmith.data.encoding_cache import CacheEntries, key_of
from lorasmith.families.base import Conditioning

_TENSOR, _MASK = "tensor.", "mask"


class EncodedCaptions:
    """Captions and their conditionings (batch of 1, on the CPU).

    `encode` is called inside `ready`, a context in which the encoder is on its device. `entries` is a context with the
    encoder's cache entries, or None. `memory_bytes` is the most that a run's conditionings may take; `encoder_bytes` is
    the encoder's memory.
    """

    def __init__(
        self,
        encode: Callable[[str], Conditioning],
        *,
        ready: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        entries: Callable[[], AbstractContextManager[CacheEntries | None]] = contextlib.nullcontext,
        memory_bytes: int = 2**32,
        encoder_bytes: int = 0,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.encoder_bytes = encoder_bytes
        self._encode = encode
        self._ready = ready
        self._entries = entries
        self._known: dict[str, Conditioning] = {}
        self._lock = threading.Lock()
        self.encoded = 0
        """Number of captions that were encoded instead of read from the cache."""

    def __getitem__(self, caption: str) -> Conditioning:
        """The conditioning of a caption; encoded now, and not kept, unless it was encoded ahead."""
        if (known := self._known.get(caption)) is not None:
            return known
        with self._lock:  # tokenizers and encoders are for one thread
            return self._encode(caption)

    def encode_ahead(self, captions: Collection[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Encode captions in order and keep them; `progress` receives (captions done, total)."""
        if not (missing := self.missing(captions)):
            return
        with self._entries() as entries, contextlib.ExitStack() as encoder:
            is_ready = False
            for done, caption in enumerate(missing, start=1):
                key = key_of(caption=caption)
                found = None if entries is None else _conditioning(caption, entries.get(key))
                if found is None:
                    if not is_ready:  # where all are in the cache, the encoder is not even read
                        encoder.enter_context(self._ready())
                        is_ready = True
                    found = self._encode(caption)
                    self.encoded += 1
                    if entries is not None:
                        entries.put(key, _tensors(found))
                self._known[caption] = found
                if progress:
                    progress(done, len(missing))

    def missing(self, captions: Collection[str]) -> list[str]:
        return [one for one in dict.fromkeys(captions) if one not in self._known]

    @property
    def bytes_each(self) -> int:
        """Bytes of the largest conditioning so far."""
        return max((sum(one.nbytes for one in known.tensors.values()) for known in self._known.values()), default=0)

    @property
    def most(self) -> int:
        """Estimated number of captions whose conditionings fit in `memory_bytes`."""
        return self.memory_bytes // max(1, self.bytes_each)

    @contextlib.contextmanager
    def staying(self) -> Iterator[None]:
        with self._ready():
            yield


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    mask = {} if conditioning.mask is None else {_MASK: conditioning.mask}
    return {_TENSOR + name: tensor for name, tensor in conditioning.tensors.items()} | mask


def _conditioning(caption: str, tensors: Mapping[str, Tensor] | None) -> Conditioning | None:
    tensors = tensors or {}
    named = {name.removeprefix(_TENSOR): one for name, one in tensors.items() if name.startswith(_TENSOR)}
    if not named:
        return None
    return Conditioning(named, text=caption, mask=tensors.get(_MASK))
