"""Encodes the captions that a run draws before its first step, or keeps the text encoders loaded if there are too
many."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from lorasmith.core.printable import memory_text
from lorasmith.core.processes import current
from lorasmith.data.dataset import EncodedDataset, Sample, Variants
from lorasmith.training.batches import sample_index
from lorasmith.training.events import CaptionsPlanned, EventHandler

_MOST_DRAWS = 50_000
"""Draws up to which their captions are listed one by one, in some seconds."""


@contextlib.contextmanager
def captions_ready(
    data: EncodedDataset, draws: range, *, seed: int, on_event: EventHandler, progress: Callable[[int, int], None]
) -> Iterator[None]:
    """Inside the context, all drawn captions are encoded (calls `progress(done, total)`), or the encoder is loaded."""
    captions, varied = data.captions, _varied(data.samples)
    if captions is None or not varied:
        yield
        return
    texts = drawn_captions(data.samples, draws, seed=seed, most=captions.most)
    if texts is not None:
        if missing := captions.missing(texts):
            needed = len(missing) * captions.bytes_each
            many = "1 variant of a caption is" if len(missing) == 1 else f"{len(missing):,} variants of captions are"
            message = f"{many} encoded before training ({memory_text(needed)})."
            on_event(CaptionsPlanned(captions=len(missing), needed_bytes=needed, message=message))
            processes = current()
            if processes.size > 1:  # each encodes a share into the cache, and reads the rest there
                captions.encode_ahead(missing[processes.rank :: processes.size], progress)
                processes.gathered(None)
            captions.encode_ahead(missing, progress)
        yield
        return
    with captions.staying():
        start = time.perf_counter()
        varied[0].encoded[varied[0].caption(seed, draws.start)]
        message = (
            f"The variants of captions that this run can draw need more than {memory_text(captions.memory_bytes)} "
            f"(caption_memory), so the text encoders stay loaded ({memory_text(captions.encoder_bytes)}) and encode a "
            f"caption per image of a step, in about {time.perf_counter() - start:.2g} s each."
        )
        on_event(CaptionsPlanned(captions=None, needed_bytes=captions.encoder_bytes, message=message))
        yield


def drawn_captions(samples: Sequence[Sample], draws: range, *, seed: int, most: int) -> list[str] | None:
    """The captions of a run's draws; of a very long run, all possible ones. None if there are more than `most`."""
    found: dict[str, None] = {}
    if len(draws) <= _MOST_DRAWS:
        for draw in draws:
            variants = samples[sample_index(draw, len(samples), seed)].variants
            if variants is not None:
                found[variants.caption(seed, draw)] = None
            if len(found) > most:
                return None
        return list(found)
    for one in _varied(samples):
        texts = one.rules.possible(one.captions, most)
        found |= dict.fromkeys(sorted(texts or ()))
        if texts is None or len(found) > most:
            return None
    return list(found)


def _varied(samples: Sequence[Sample]) -> list[Variants]:
    """The variants of each distinct sample that has some."""
    return [one.variants for one in {id(one): one for one in samples}.values() if one.variants is not None]
