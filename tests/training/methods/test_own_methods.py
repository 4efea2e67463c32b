"""Methods of programs and packages: in a step, recorded, continued, or refused."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_code import same
from torch import Tensor

import lorasmith as ls
from lorasmith.adapters.adapter import Adapter
from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.extensions import Extension
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset
from lorasmith.families.model import Model
from lorasmith.runs.recorded_run import read_run_file
from lorasmith.training.config import TrainConfig, settings_from_file
from lorasmith.training.job import plan_job
from lorasmith.training.methods.method import Method, Passes
from lorasmith.training.methods.texts import TextRule
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Facts, Trainable
from tests.installed import install
from tests.training.methods.gradient_cases import gradients, mean

Run = Callable[..., TrainResult]


@pytest.fixture
def run(quick_run: Run) -> Run:
    return quick_run


@dataclass(frozen=True)
class Blank(Method):
    """What preserve blank does, and a price of the weights."""

    weight: float = 1.0
    price: float = 0.0
    least: int = 0

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        if len(adapters) < self.least:
            raise OptionError(f"Blank needs {self.least} adapters, got {len(adapters)}; choose more targets")

    @property
    def texts(self) -> Mapping[str, TextRule]:
        return {"nothing": lambda caption, trigger: ""}

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        kept = passes.frozen("nothing")
        yield self.weight * mean(passes.trained("nothing") - kept)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        return (
            self.price * torch.stack([one.square().sum() for it in adapters.values() for one in it.parameters()]).sum()
        )


@dataclass(frozen=True)
class Total(Method):
    """A term that is not one of each sample."""

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        yield mean(passes.trained()).mean()


@pytest.fixture
def texts(tiny: Model, dataset: EncodedDataset) -> EncodedDataset:
    return replace(dataset, captions=EncodedCaptions(tiny.text_encoder.encode))


def test_a_step_has_its_terms_and_its_penalty(tiny: Model, hand_made: Trainable, texts: EncodedDataset) -> None:
    blank = tiny.text_encoder.encode("")

    def reference(batch: Any, trained: Any, frozen: Any, target: Tensor) -> Tensor:
        empty = batch.conditioning.with_text(hand_made.join([blank] * len(batch.names)))
        kept = 0.5 * mean(trained(empty) - frozen(empty))
        return mean(trained(batch.conditioning) - target) + kept

    _, gradient, _, expected = gradients(hand_made, texts, reference, method=Blank, method_args="weight=0.5")
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    _, priced, _, _ = gradients(hand_made, texts, reference, method=Blank, method_args="weight=0.5 price=0.1")
    assert float((priced - gradient).norm()) > 0.01 * float(gradient.norm())


def test_a_class_a_function_a_path_and_a_name_are_one_method(run: Run, texts: EncodedDataset) -> None:
    ls.register("methods", "blank", Blank)
    built_in = run(texts, preserve="blank")
    for method in (Blank, functools.partial(Blank, weight=1.0), f"{__name__}:Blank", "blank"):
        assert same(run(texts, method=method), built_in), method


def test_a_run_continues_to_the_bit_and_is_told_from_others(run: Run, texts: EncodedDataset, tmp_path: Path) -> None:
    ls.register("methods", "blank", Blank)
    own: dict[str, Any] = {"method": "blank", "method_args": "price=0.01", "steps": 4}
    whole = run(texts, **own)
    done = itertools.count()
    assert len(run(texts, output=tmp_path, cancelled=lambda: next(done) == 2, **own).losses) == 2
    for other in ({"method_args": "price=0.02"}, {"method": Blank}, {"method": None}):
        with pytest.raises(OutputError, match="another run"):
            run(texts, output=tmp_path, **{**own, **other})
    assert same(run(texts, output=tmp_path, **own), whole)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["fingerprint"]["config"]["method"] == "blank"
    assert record["fingerprint"]["config"]["method_args"] == "price=0.01"


def test_a_package_brings_one_and_the_run_names_it(
    tiny: Model, texts: EncodedDataset, built_in_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path / "site", {"keeping": {"methods": {"blank": f"{__name__}:Blank"}}})
    asked = TrainConfig(method="BLANK", rank=2, targets="*.attn2.to_q")
    brought = Extension(kind="methods", name="blank", package="keeping", version="0.1")
    assert plan_job(tiny.denoiser, asked, "cpu").extensions == (brought,)
    folder = tmp_path / "run"
    built_in_run(texts, method="blank", output=folder)
    install(monkeypatch, tmp_path / "elsewhere", {})
    with pytest.raises(OptionError, match=r"method 'blank' of the package keeping 0\.1, which is not installed"):
        read_run_file(folder / "run.json")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "blank"}, "method must be of an extension, and none is installed, got 'blank'"),
        ({"method": Blank, "method_args": "wait=1"}, "has no argument 'wait'.*; it has least, price, weight"),
        ({"method": lambda: 3}, "method must be of a subclass of .*Method, but .* is of int"),
        ({"method": Blank, "method_args": "least=500"}, "Blank needs 500 adapters, got"),
        ({"method": Total}, "a term of method must return a differentiable float tensor of shape .*, got"),
        ({"method": f"{__name__}:Run.x"}, "has no method 'Run.x'"),
    ],
)
def test_what_is_no_method_is_refused(run: Run, texts: EncodedDataset, settings: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        run(texts, **settings)


def test_only_methods_are_registered_and_files_choose_among_names(tiny: Model) -> None:
    with pytest.raises(OptionError, match=r"method 'blank' cannot be registered: it must be a subclass of .*\.Method"):
        ls.register("methods", "blank", functools.partial(Blank))
    with pytest.raises(OptionError, match=r"method in a file must be one of those of installed packages, got 'a\.b'"):
        settings_from_file({"method": "a.b"})
    assert list(TrainConfig(method_args="x=1").idle_settings()) == ["method_args x=1 has no effect without method."]
