from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorasmith.core.errors import ModelError
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Model


def test_a_prompt_becomes_one_conditioning_with_its_text(bench: Any, tiny: Model) -> None:
    (plain,) = bench.one("CLIPTextEncode", text="a fox", clip=tiny.text_encoder)
    (weighted,) = bench.one("CLIPTextEncode", text="a (fox:1.4)", clip=tiny.text_encoder)
    assert plain.text == "a fox"
    assert plain.tensors["context"].shape == weighted.tensors["context"].shape
    assert not torch.equal(plain.tensors["context"], weighted.tensors["context"])


def test_stopping_a_layer_earlier_skips_one(bench: Any, tiny: Model) -> None:
    assert bench.one("CLIPSetLastLayer", clip=tiny.text_encoder, stop_at_clip_layer=-1).skip_layers == 0
    skipped = bench.one("CLIPSetLastLayer", clip=tiny.text_encoder, stop_at_clip_layer=-2)
    assert skipped.skip_layers == 1
    assert tiny.text_encoder.skip_layers == 0
    contexts = [
        bench.one("CLIPTextEncode", text="a fox", clip=clip)[0].tensors["context"]
        for clip in (tiny.text_encoder, skipped)
    ]
    assert not torch.allclose(*contexts)


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


def test_a_model_without_text_encoder_is_refused(bench: Any, tiny: Model) -> None:
    bare = replace(tiny, components=replace(tiny.components, text_encoders={}))
    with pytest.raises(ModelError, match="needs the text encoder clip_l"):
        bench.call("CLIPTextEncode", text="a fox", clip=bare.text_encoder)
