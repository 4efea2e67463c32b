"""What the library's functions take as a model and as data, how they refuse the rest, and what `help` says."""

from __future__ import annotations

import json
import os
import pydoc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lorasmith as ls
from lorasmith.core.adapter_state import AdapterState
from lorasmith.core.extras import TINY
from lorasmith.core.options import options_of
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.reproduce import Reproduction
from tests.hosts import Audience

SHORT: dict[str, Any] = {"steps": 2, "rank": 2, "targets": "attention", "training_dtype": "fp32", "progress": False}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tiny: ls.Model) -> ls.EncodedDataset:
    return ls.load_dataset([(one, "a dog") for one in PIXELS], tiny, resolution=32, progress=False)


def pictures() -> Iterator[Any]:
    for one in PIXELS:
        yield one, "a dog"


def test_what_load_dataset_takes_is_encoded_with_the_trigger(tiny: ls.Model, tmp_path: Path) -> None:
    result = ls.train(tiny, pictures(), trigger="sks", output=tmp_path / "run", **SHORT)
    assert json.loads(result.lora.metadata["ss_tag_frequency"]) == {"dataset": {"a dog": 4, "sks": 4}}
    source = json.loads((tmp_path / "run" / "run.json").read_text())["source"]
    assert source == {"command": "lorasmith.train", "images": "pictures in memory"}
    assert result.path is not None
    with pytest.raises(ls.errors.OptionError, match=r"is from pictures in memory, .*call lorasmith.train again"):
        Reproduction(result.path, Audience())
    short = {**SHORT, "steps": 1}
    assert ls.train(tiny, [*pictures()], validation=pictures(), **short).validations
    (alone,) = ls.train_together(tiny, pictures(), [{}], **short)
    assert isinstance(alone, ls.TrainResult), alone


def test_samples_one_by_one_are_those_of_load_dataset(tiny: ls.Model, data: ls.EncodedDataset) -> None:
    samples = [ls.encode(tiny, one, "a dog", resolution=32) for one in PIXELS]
    for ours, theirs in zip(samples, data, strict=True):
        assert torch.equal(ours.latents, theirs.latents) and ours.digest == theirs.digest
    assert len({one.name for one in samples}) == 4, "held out apart"
    named = ls.encode(tiny, PIXELS[0], "a dog", name="first", mask=np.ones((32, 32), bool), resolution=32)
    assert named.name == "first" and named.places is not None
    file = ls.encode(tiny, TINY.folder / "input" / "fox" / "fox_1.png", resolution=32)
    assert file.name == "fox_1.png" and file.conditioning.text


def test_captions_of_a_lone_sample_are_encoded_at_once(tiny: ls.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ls.encode(tiny, PIXELS[0], ["a dog", "{a|the} cat"], wildcards=True, caption_dropout=0.5, resolution=32)
    assert sample.variants is not None
    monkeypatch.setattr(sample.variants.encoded, "_encode", None)
    assert {sample.drawn(0, draw).conditioning.text for draw in range(40)} == {"a dog", "a cat", "the cat", ""}
    with pytest.raises(ls.errors.OptionError, match="at most 1,000 variants"):
        ls.encode(tiny, PIXELS[0], "a, b, c, d, e, f, g, h", shuffle_tags=True, resolution=32)


class Pipe:
    components = 3
    config = 4


NO_MODELS: list[Any] = [None, 3, {}, b"x", "nothing", Path("nothing"), torch.nn.Linear(2, 2), [1], Pipe(), ls.Model]
NO_DATA: list[Any] = [None, 3, {}, b"x", "nothing", torch.nn.Linear(2, 2), [], [None], [(1, 2)], PIXELS, Pipe(), object]


@pytest.mark.parametrize("given", NO_MODELS, ids=lambda one: type(one).__name__)
def test_what_is_no_model_is_refused(given: Any, data: ls.EncodedDataset) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ls.load_model(given),
        lambda: ls.train(given, data, **SHORT),
        lambda: ls.train_together(given, data, [{}]),
        lambda: ls.load_dataset(pictures(), given),
        lambda: ls.encode(given, PIXELS[0], "a dog"),
        lambda: ls.generate(given, "a dog"),
    ]
    for call in calls:
        with pytest.raises(ls.errors.ModelError, match=r"must be|there is no model"):
            call()


@pytest.mark.parametrize("given", NO_DATA, ids=lambda one: type(one).__name__)
def test_what_is_no_data_is_refused(given: Any, tiny: ls.Model) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ls.train(tiny, given, **SHORT),
        lambda: ls.train_together(tiny, given, [{}]),
        lambda: ls.load_dataset(given, tiny),
    ]
    for call in calls:
        with pytest.raises(ls.errors.DataError, match=r"must be|must have|needs|does not exist"):
            call()


def test_the_remedy_is_named(tiny: ls.Model, data: ls.EncodedDataset) -> None:
    given: dict[str, Any] = {"the model comes first": data, "Trainable": torch.nn.Linear(2, 2), "tensors alone": {}}
    for remedy, one in given.items():
        with pytest.raises(ls.errors.ModelError, match=remedy):
            ls.train(one, tiny)
    with pytest.raises(ls.errors.DataError, match="in the order of the arguments"):
        ls.load_dataset(tiny, "photos")
    with pytest.raises(ls.errors.DataError, match="give it to train as it is"):
        ls.load_dataset(data, tiny)
    with pytest.raises(ls.errors.DataError, match="the dataset of the loader"):
        ls.train(tiny, DataLoader([1]))  # type: ignore[arg-type]


def test_arguments_of_other_classes_are_taken(tiny: ls.Model, data: ls.EncodedDataset, tmp_path: Path) -> None:
    class Place(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "run")

    count: Any = np.int64(1)
    ls.train(tiny, data, output=Place(), steps=count, progress=False)
    assert (tmp_path / "run" / "run.json").is_file()
    one, same = (ls.generate(tiny, ("a cat",), seed=seed, steps=1, progress=False)[0] for seed in (1, count))
    assert one == same


@pytest.mark.parametrize(
    "call",
    [
        lambda tiny, data: ls.train(tiny, data, output=3),
        lambda tiny, data: ls.train(tiny, data, config={"steps": 3}),
        lambda tiny, data: ls.train(tiny, data, on_event="print"),
        lambda tiny, data: ls.train(tiny, data, cancelled=True),
        lambda tiny, data: ls.train(tiny, data, device=0),
        lambda tiny, data: ls.train_together(tiny, data, {"steps": 1}),
        lambda tiny, data: ls.train_together(tiny, data, [3]),
        lambda tiny, data: ls.train_together(tiny, data, [{}], cancelled=True),
        lambda tiny, data: ls.load_dataset([], tiny, progress="yes"),
        lambda tiny, data: ls.encode(tiny, PIXELS[0], "a dog", name=3),
        lambda tiny, data: ls.generate(tiny, None),
        lambda tiny, data: ls.generate("a cat", tiny),
        lambda tiny, data: ls.generate(tiny, ["a", 3]),
        lambda tiny, data: ls.generate(tiny, "a", loras=3),
        lambda tiny, data: ls.generate(tiny, "a", steps="20"),
        lambda tiny, data: ls.load_model(BUILT_IN, dtype="bf16"),
        lambda tiny, data: ls.Lora.load(None),
        lambda tiny, data: ls.Lora.load("dog.safetensors", "sd15.safetensors"),
        lambda tiny, data: ls.Lora(AdapterState(), tiny.names).applied_to("sd15.safetensors"),
        lambda tiny, data: ls.Lora(AdapterState(), tiny.names).save(3),
        lambda tiny, data: ls.register("losses", 3, print),
        lambda tiny, data: ls.run_workflow(None),
        lambda tiny, data: ls.run_workflow("example:folder", changes=[1]),
    ],
)
def test_arguments_of_another_type_are_refused(call: Any, tiny: ls.Model, data: ls.EncodedDataset) -> None:
    with pytest.raises(ls.errors.OptionError, match=r"must be .*, got .*; help\(lorasmith\.[\w.]+\) explains it"):
        call(tiny, data)


def test_unknown_names_and_impossible_values_are_refused(tiny: ls.Model, data: ls.EncodedDataset) -> None:
    calls: dict[str, Callable[[], object]] = {
        "generate has no argument 'step' .did you mean 'steps'": lambda: ls.generate(tiny, "a", step=3),  # type: ignore[call-overload]
        "steps must be at least 1, got 0": lambda: ls.generate(tiny, "a", steps=0),
        "dtype must be a format of floats": lambda: ls.generate(tiny, "a", dtype=torch.int8),
        "at least one run's arguments": lambda: ls.train_together(tiny, data, []),
        "a source of images must have a path, got 3": lambda: ls.ImageSource(3),  # type: ignore[arg-type]
        "must have a name": lambda: ls.register("losses", " ", print),
        "it must be a function": lambda: ls.register("schedules", "steep", 3),
        "is a class; pass an instance": lambda: ls.train(tiny, data, loss=torch.nn.MSELoss, **SHORT),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with pytest.raises(ls.errors.OptionError, match=message):
            call()


def test_paths_are_texts_or_paths(tiny: ls.Model, data: ls.EncodedDataset, tmp_path: Path) -> None:
    file = ls.train(tiny, data, **SHORT).lora.save(tmp_path / "dog.safetensors")
    assert ls.ImageSource(tmp_path) == ls.ImageSource(str(tmp_path))  # type: ignore[arg-type]
    assert ls.train(tiny, data, existing_lora=file, **SHORT).lora.steps == 2 * SHORT["steps"]  # type: ignore[arg-type]
    assert isinstance(ls.Lora.load(file).applied_to(tiny), ls.Denoiser)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.Sample(np.zeros((4, 8, 8))), "got an? ndarray"),
        (lambda: ls.Sample(torch.zeros(1, 2, 4, 8, 8)), r"got torch.float32 \(1, 2, 4, 8, 8\)"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8).long()), "got torch.int64"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), torch.zeros(1, 7, 3)), r'Conditioning\({"context": tensor}\)'),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), ls.Conditioning({"context": torch.zeros(7, 3)})), "batch of 1"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), ls.Conditioning({"context": 3})), "got 3 as context"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), ls.Conditioning(torch.zeros(1, 7, 3))), "a mapping by name"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), weight="x"), "weight of a sample must be a number from 0, got 'x'"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), places=torch.ones(3, 3)), r"must be \(8, 8\) as its latents"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), places=3), r"must be \(8, 8\) as its latents, got 3"),
        (lambda: ls.Sample(torch.zeros(4, 8, 8), name=3), "name of a sample must be a text, got 3"),
        (lambda: ls.Conditioning([torch.zeros(1, 7, 3)]), "a mapping by name, got a list"),
        (lambda: ls.EncodedDataset(()), "at least one sample"),
        (lambda: ls.EncodedDataset("abc"), "list of samples"),
        (lambda: ls.EncodedDataset([3]), "got 3 as number 0"),
    ],
)
def test_samples_by_hand_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ls.errors.DataError, match=message):
        make()


@pytest.mark.parametrize("shape", [(16, 8, 8), (4, 2, 8, 8)])
def test_latents_of_another_model_are_refused(shape: tuple[int, ...], tiny: ls.Model) -> None:
    with pytest.raises(ls.errors.DataError, match=r"must be \(4, height, width\), got .* encode the pictures with"):
        ls.train(tiny, [ls.Sample(torch.zeros(shape), tiny.text_encoder.encode("a dog"))], **SHORT)


def test_samples_by_hand_have_defaults() -> None:
    first, second = ls.Sample(torch.ones(4, 8, 8).half()), ls.Sample(torch.zeros(4, 8, 8, requires_grad=True))
    assert first.latents.dtype == torch.float32 and not second.latents.requires_grad
    assert first.conditioning.tensors == {} and first.name != second.name == ls.Sample(torch.zeros(4, 8, 8)).name
    found = ls.EncodedDataset([first, second])  # type: ignore[arg-type]
    assert len(found) == 2 and found[-1] is second and list(found) == [first, second] and first in found
    assert isinstance(found[1:], ls.EncodedDataset) and len(found[1:]) == 1
    with pytest.raises(IndexError):
        found[2]


def test_parts_are_shown_on_one_line(tiny: ls.Model, data: ls.EncodedDataset) -> None:
    result = ls.train(tiny, data, **SHORT)
    assert repr(ls.TrainConfig(steps=3, rank=16)) == "TrainConfig(steps=3)"
    assert repr(ls.DataConfig(flip=True)) == "DataConfig(flip=True)"
    assert repr(ls.ImageSource("a b", weight=0.5)) == "ImageSource('a b', weight=0.5)"
    assert repr(data[0].conditioning) == "Conditioning('a dog', context 1×77×128, pooled 1×128)"
    parts = [tiny, tiny.denoiser, tiny.text_encoder, tiny.autoencoder, data, data[0], result, result.lora]
    for one in parts:
        shown = repr(one)
        assert shown.startswith(f"{type(one).__name__}(") and len(shown) < 200 and "\n" not in shown
        assert "tensor" not in shown


@pytest.mark.parametrize(
    ("function", "kinds"), [(ls.train, ls.TrainConfig), (ls.load_dataset, ls.DataConfig), (ls.encode, ls.DataConfig)]
)
def test_help_explains_each_setting(function: Any, kinds: type) -> None:
    text = pydoc.getdoc(function)  # behind the signature, which Python 3.13 shows line by line
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for name, declared in options_of(kinds).items():
        facts = f"{name} ({declared.type.__name__}, default {declared.default!r}"
        assert facts in words and " ".join(declared.help.split()) in words, name
        assert (declared.min is None and declared.max is None) or f"{facts}, {declared.range_text()})" in words, name
    assert "config: base settings" in words and "device: where to" in words
