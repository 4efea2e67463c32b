"""Train LoRA with a CLIP: methods that encode texts, and LoRAs on text encoders, from a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Executor, validate
from tests.nodes.graphs import Prompt, api, trained

Make = Callable[..., Any]
QUICK: dict[str, Any] = {"targets": "*.attn2.to_q", "steps": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}
METHODS: tuple[dict[str, Any], ...] = (
    {"preserve": "blank"},
    {"preserve": "class", "preserve_class": "dog", "trigger": "fox"},
    {"slider_positive": "a red fox", "slider_negative": "a blue fox", "slider_anchors": "a bus"},
    {"train_text_encoder": True, "text_encoder_rank": 2},
)


@pytest.fixture
def train(bench: Any, tiny: Model, latents: Make, captions: list[Conditioning]) -> Callable[..., Any]:
    """Trains a few layers of the built-in model with its CLIP."""

    def call(*, lists: dict[str, list[Any]] | None = None, **values: Any) -> Any:
        given = {**QUICK, "model": tiny.denoiser, "clip": tiny.text_encoder, **values}
        lists = {"latents": [latents(3)], "positive": [captions], **(lists or {})}
        return bench.call("TrainLoraNode", lists=lists, **{key: one for key, one in given.items() if one is not None})

    return call


def losses(result: Any) -> list[float]:
    found: list[float] = result.outputs[1][0]["loss"]
    return found


def weights(result: Any) -> dict[str, Tensor]:
    adapters = result.outputs[0][0].state.adapters.items()
    return {
        f"{ref.component} {ref.path} {name}": tensor for ref, one in adapters for name, tensor in one.tensors.items()
    }


def parts(lora: Lora) -> set[str]:
    return {ref.component for ref in lora.state.adapters}


def test_what_encodes_texts_trains(train: Make, bench: Any) -> None:
    plain = weights(train(clip=None, learning_rate=1e-2))
    result = weights(train(preserve="blank", learning_rate=1e-2))
    assert result.keys() == plain.keys() and not all(torch.equal(one, result[name]) for name, one in plain.items())
    assert not [one for one in bench.messages("warning") if "has no effect" in one]


def test_the_class_takes_the_place_of_the_trigger(train: Make, monkeypatch: pytest.MonkeyPatch, tiny: Model) -> None:
    seen: list[str] = []
    encode = type(tiny.text_encoder).encode

    def listening(self: Any, text: str, *pictures: Any, **sight: Any) -> Conditioning:
        seen.append(text)
        return encode(self, text, *pictures, **sight)

    monkeypatch.setattr(type(tiny.text_encoder), "encode", listening)
    result = train(preserve="class", preserve_class="dog", trigger="fox", steps=1)
    assert set(seen) == {"a fox", "a dog", "dog, a red bus", "dog, a green tree"}
    assert result.outputs[0][0].state.metadata["modelspec.trigger_phrase"] == "fox"


@pytest.mark.parametrize("setting", METHODS, ids=lambda one: next(iter(one)))
def test_without_a_clip_the_remedy_is_a_link(train: Make, setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    with pytest.raises(OptionError, match=f"{name} encodes texts in training, .*; link the CLIP of the captions to"):
        train(clip=None, **setting)


def test_captions_must_be_known_and_of_that_clip(train: Make, tiny: Model, captions: list[Conditioning]) -> None:
    unknown = [captions[0], replace(captions[1], text=None), captions[2]]
    with pytest.raises(DataError, match=r"preserve needs the caption .* that of image 2 is unknown; encode captions"):
        train(preserve="blank", lists={"positive": [unknown]})
    skipping = replace(tiny.text_encoder, encoding=replace(tiny.text_encoder.encoding, skip_layers=1))
    with pytest.raises(DataError, match=r"preserve needs captions that clip encodes as they are.*'a fox'; link one"):
        train(preserve="blank", clip=skipping)
    with pytest.raises(ModelError, match=r"text encoders must be those of lorasmith-tiny \(Stable Diffusion 1"):
        other = replace(tiny.text_encoder, family=type("Other", (), {"name": "x", "clip_types": (), "title": "X"})())
        train(preserve="blank", clip=other)


def test_a_clip_that_nothing_needs_says_so(train: Make, bench: Any) -> None:
    train(steps=1)
    assert "clip has no effect: no setting of this run encodes texts." in bench.messages("info")


def test_a_new_word_needs_the_clip(train: Make, bench: Any) -> None:
    with pytest.raises(OptionError, match=r"new_word encodes texts in training, .*; link the CLIP of the captions to"):
        train(clip=None, new_word="fox")
    lora = train(new_word="fox", steps=1).outputs[0][0]
    assert lora.state.words.keys() == {"fox"}
    assert not [one for one in bench.messages("info") if "clip has no effect" in one]


def test_options_and_loras_of_the_clip_are_kept(train: Make, tiny: Model, tmp_path: Path) -> None:
    """A skipped layer and a LoRA below: a fresh LoRA has the loss of the captions as they were encoded."""
    (lora,) = train(train_text_encoder=True, learning_rate=1e-1).outputs[0]
    skipping = replace(tiny.text_encoder, encoding=replace(tiny.text_encoder.encoding, skip_layers=1))
    for clip in (skipping, lora.applied(None, tiny.text_encoder, strength=1.0).encoder):
        with clip.active():
            encoded = [clip.encode(text) for text in ("a fox", "a red bus", "a (green:1.2) tree")]
        (first,) = losses(train(train_text_encoder=True, clip=clip, steps=1, lists={"positive": [encoded]}))
        (plain,) = losses(train(clip=None, steps=1, lists={"positive": [encoded]}))
        assert first == pytest.approx(plain, rel=1e-5)


def checkpoint_graph(**changes: Any) -> Prompt:
    """A graph that trains on two pictures and draws with model and CLIP of the saved LoRA."""
    return {
        "load": api("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors"),
        "image": api("LoadImage", image="fox/fox_1.png"),
        "small": api("ImageScale", image=["image", 0], upscale_method="area", width=32, height=32, crop="center"),
        "data": api("MakeTrainingDataset", images=["small", 0], vae=["load", 2], clip=["load", 1], texts="a fox"),
        "train": trained(["data", 0], ["data", 1], model="load", clip=["load", 1], **changes),
        "save": api("SaveLoRA", lora=["train", 0], prefix="loras/fox", steps=["train", 2]),
    }


def test_the_saved_lora_has_both_parts_and_load_lora_applies_them(bench: Any, tiny: Model) -> None:
    executor = Executor(bench.folders)
    graph = checkpoint_graph(train_text_encoder=True, text_encoder_rate=1e-2, text_encoder_rank=3)
    executor.run(validate(graph, bench.folders))
    lora = Lora.load(bench.folders.find("loras", "fox_2_steps_00001_.safetensors"), tiny)
    assert parts(lora) == {DENOISER, "text_encoder"} and not lora.state.unknown
    ranks = {one.tensors["down"].shape[0] for ref, one in lora.state.adapters.items() if ref.component != DENOISER}
    assert ranks == {3}
    clip = tiny.text_encoder
    applied = bench.call(
        "LoraLoader",
        model=tiny.denoiser,
        clip=clip,
        lora_name="fox_2_steps_00001_.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    (denoiser,), (encoder,) = applied.outputs
    assert len(denoiser.patches) == 1 and len(encoder.patches) == 1
    contexts: list[Tensor] = []
    for one in (clip, encoder):
        with one.active():
            contexts.append(one.encode("a fox").tensors["context"])
    assert not torch.equal(*contexts)
