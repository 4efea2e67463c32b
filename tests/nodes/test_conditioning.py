from __future__ import annotations

from typing import Any

import pytest
import torch

from lorasmith.core.errors import DataError
from lorasmith.families.conditionings import Conditioning


def test_combining_keeps_the_order(bench: Any, captions: list[Conditioning]) -> None:
    combined = bench.one("ConditioningCombine", conditioning_1=captions[:2], conditioning_2=captions[2:])
    assert combined == captions


def test_zeroing_out_leaves_settings_alone(bench: Any, captions: list[Conditioning]) -> None:
    guided = Conditioning({**captions[0].tensors, "guidance": torch.tensor([3.5])})
    (zeroed,) = bench.one("ConditioningZeroOut", conditioning=[guided])
    assert not zeroed.tensors["context"].any()
    assert not zeroed.tensors["pooled"].any()
    assert zeroed.tensors["guidance"].item() == 3.5
    assert guided.tensors["context"].any()


def test_zeroing_out_keeps_the_span(bench: Any, captions: list[Conditioning]) -> None:
    late = bench.one("ConditioningSetTimestepRange", conditioning=captions[:1], start=0.25, end=1.0)
    (zeroed,) = bench.one("ConditioningZeroOut", conditioning=late)
    assert zeroed.span == late[0].span == (0.25, 1.0)
    assert captions[0].span == (0.0, 1.0)


def test_averages_keep_the_settings_of_the_first(bench: Any, captions: list[Conditioning]) -> None:
    to = Conditioning({"context": torch.ones(1, 3, 2), "guidance": torch.tensor([3.5])}, "to")
    source = Conditioning({"context": torch.full((1, 2, 2), 5.0), "pooled": torch.ones(1, 4)})
    (mixed,) = bench.one(
        "ConditioningAverage",
        conditioning_to=[to],
        conditioning_from=[source, captions[0]],
        conditioning_to_strength=0.75,
    )
    assert mixed.tensors["context"][0, :, 0].tolist() == [2.0, 2.0, 0.75]  # padded with zeros
    assert mixed.tensors["pooled"].tolist() == [[1.0] * 4]
    assert mixed.tensors["guidance"].item() == 3.5
    assert mixed.text == "to"
    assert bench.messages("warning") == ["conditioning_from takes one prompt but received 2; the first one is used"]
    longer = Conditioning({"context": torch.zeros(1, 9, 2)})
    (cut,) = bench.one(
        "ConditioningAverage", conditioning_to=[to], conditioning_from=[longer], conditioning_to_strength=0.5
    )
    assert cut.tensors["context"].shape == (1, 3, 2)


def test_averages_of_different_encoders_are_refused(bench: Any, captions: list[Conditioning]) -> None:
    other = Conditioning({"context": torch.zeros(1, 77, 2)})
    with pytest.raises(DataError, match=r"got a context of width 128 and one of 2; encode both with one CLIP"):
        bench.call("ConditioningAverage", conditioning_to=captions, conditioning_from=[other])


def test_guidance_is_set_and_left_out(bench: Any, captions: list[Conditioning]) -> None:
    guided = bench.one("FluxGuidance", conditioning=captions, guidance=4.0)
    assert [one.tensors["guidance"].tolist() for one in guided] == [[4.0]] * 3
    without = bench.one("FluxDisableGuidance", conditioning=guided)
    assert all("no_guidance" in one.tensors and "guidance" not in one.tensors for one in without)
    again = bench.one("FluxGuidance", conditioning=without, guidance=1.0)
    assert all("no_guidance" not in one.tensors for one in again)
    assert [one.text for one in again] == [one.text for one in captions]
