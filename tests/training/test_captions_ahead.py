"""What a run draws of its samples, encoded ahead or while it trains: the same run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_engine import tensors

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.processes import Processes
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Autoencoder, Model, TextEncoder
from lorasmith.runs.library import train
from lorasmith.training import batches
from lorasmith.training.batches import drawn_captions, sample_index
from lorasmith.training.events import CaptionEncoded, CaptionsPlanned, Event
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import trainable

VARIED: dict[str, Any] = {
    "trigger": "sks",
    "flip": True,
    "crop_jitter": 0.1,
    "picture_variants": 2,
    "shuffle_tags": True,
    "tag_dropout": 0.2,
    "caption_dropout": 0.2,
    "wildcards": True,
    "resolution": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for number, source in enumerate(sorted((BUILT_IN_BASE / "input" / "fox").glob("*.png"))[:4]):
        with Image.open(source) as picture:
            picture.save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"a {{red|small}} fox, tag {number}, on a beach, at night, in snow")
    return path


def trained(tiny: Model, folder: Path, *, events: list[Event] | None = None, **settings: Any) -> TrainResult:
    data = load_dataset(folder, tiny, **{**VARIED, **settings})
    hear = (lambda event: None) if events is None else events.append
    return train(
        tiny, data, steps=2, rank=2, batch_size=2, targets="*.attn2.to_q", training_dtype="fp32", on_event=hear
    )


def same(one: TrainResult, other: TrainResult) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and one.losses == other.losses


def test_cached_ahead_and_while_training_are_the_same_run_to_the_bit(
    tiny: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unused in folder.glob("[23].*"):
        unused.unlink()
    events: list[Event] = []
    plain = trained(tiny, folder, cache=False, events=events)
    (planned,) = (event for event in events if isinstance(event, CaptionsPlanned))
    assert planned.captions is not None and 2 <= planned.captions <= 4
    assert sum(isinstance(event, CaptionEncoded) for event in events) == planned.captions
    staying: list[Event] = []
    assert same(trained(tiny, folder, cache=False, caption_memory=0.0, events=staying), plain)
    (planned,) = (event for event in staying if isinstance(event, CaptionsPlanned))
    assert planned.captions is None and "the text encoders stay loaded" in planned.message
    assert same(trained(tiny, folder), plain), "into the cache"

    def encodes(self: object, *args: object) -> None:
        raise AssertionError("everything is in the cache")

    monkeypatch.setattr(TextEncoder, "encode", encodes)
    monkeypatch.setattr(Autoencoder, "encode", encodes)
    assert same(trained(tiny, folder), plain), "from the cache"


def test_a_run_without_variants_of_captions_has_none_to_plan(tiny: Model, folder: Path) -> None:
    events: list[Event] = []
    data = load_dataset(folder, tiny, resolution=64, flip=True)
    train(tiny, data, steps=1, rank=1, targets="*mid_block*to_q", on_event=events.append)
    assert not [event for event in events if isinstance(event, CaptionsPlanned)]


def test_what_is_drawn_or_else_all_that_is_possible(tiny: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(folder, tiny, resolution=64, wildcards=True, caption_dropout=0.1)
    found = drawn_captions(data.samples, range(10), seed=3, most=100)
    assert found is not None and 4 <= len(found) <= 9
    assert found == [data.samples[sample_index(n, 4, 3)].drawn(3, n).conditioning.text for n in range(len(found))]
    assert drawn_captions(data.samples, range(10), seed=3, most=3) is None
    monkeypatch.setattr(batches, "_MOST_DRAWS", 5)
    everything = drawn_captions(data.samples, range(10**6), seed=3, most=100)
    assert everything is not None and len(everything) == 4 * 2 + 1, "two alternatives each, and the empty caption"
    assert set(found) <= set(everything)
    many = load_dataset(folder, tiny, resolution=64, shuffle_tags=True)
    assert drawn_captions(many.samples, range(10**6), seed=3, most=20) is None


@pytest.mark.slow
def test_exactly_what_was_changed_is_encoded_again(
    tiny: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"texts": 0, "pictures": 0}
    text, picture = TextEncoder.encode, Autoencoder.encode

    def encode_text(self: TextEncoder, prompt: Any) -> Any:
        counts["texts"] += 1
        return text(self, prompt)

    def encode_picture(self: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        counts["pictures"] += len(pixels)
        return picture(self, pixels)

    monkeypatch.setattr(TextEncoder, "encode", encode_text)
    monkeypatch.setattr(Autoencoder, "encode", encode_picture)

    def encoded(model: Model = tiny, **settings: Any) -> tuple[int, int]:
        counts.update(texts=0, pictures=0)
        load_dataset(folder, model, **{"resolution": 64, **settings})
        return counts["texts"], counts["pictures"]

    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    assert encoded() == (4, 4)
    assert encoded() == (0, 0)
    with Image.open(folder / "1.png") as one:
        one.transpose(Image.Transpose.ROTATE_90).save(folder / "1.png")
    assert encoded() == (0, 1)
    (folder / "2.txt").write_text("another caption")
    assert encoded() == (1, 0)
    assert encoded(resolution=48) == (0, 4)
    assert encoded(flip=True) == (0, 4), "the mirrored ones"
    assert encoded(trigger="sks") == (4, 0)
    assert encoded(masks="alpha") == (0, 4)
    assert encoded() == (0, 0)
    changed = load_changed(tiny, "text_encoder")
    assert encoded(changed) == (4, 0)
    assert encoded(load_changed(tiny, "vae")) == (0, 4)
    assert encoded() == (0, 0)
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "another"))
    assert encoded() == (4, 4)
    assert encoded(cache=False) == (4, 4)


def load_changed(tiny: Model, part: str) -> Model:
    """The model with one number of one part changed."""
    components = tiny.components
    if part == "vae":
        module = copy.deepcopy(components.vae)
        components = replace(components, vae=module)
    else:
        module = copy.deepcopy(components.text_encoders[part])
        components = replace(components, text_encoders={**components.text_encoders, part: module})
    with torch.no_grad():
        next(iter(module.parameters())).flatten()[0] += 0.01
    return replace(tiny, components=components)


class OneOfThree(Processes):
    rank, size = 1, 3

    def __init__(self) -> None:
        self.meetings: list[int] = []
        self.encoded = lambda: 0

    def gathered(self, value: Any) -> list[Any]:
        self.meetings.append(self.encoded())
        return [value] * self.size


def test_several_processes_encode_a_share_each_before_they_meet(
    tiny: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, together = load_dataset(folder, tiny, **VARIED, cache=False), OneOfThree()
    assert data.captions is not None
    before = data.captions.encoded
    together.encoded = lambda: data.captions.encoded - before  # type: ignore[union-attr]
    monkeypatch.setattr(batches, "current", lambda: together)
    with batches.captions_ready(
        data,
        range(12),
        seed=0,
        on_event=lambda event: None,
        progress=lambda done, total: None,
        model=trainable(tiny),
    ):
        pass
    (share,) = together.meetings
    assert 0 < share < together.encoded() and abs(3 * share - together.encoded()) <= 3
