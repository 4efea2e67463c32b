"""Text encoders in training, for each family that has them: what is encoded again, what learns, what files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import FLUX1
from tiny_sd3 import SD3
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER
from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import PictureSize
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except

PREFIXES = {
    "sd1": {"lora_te_": 12},
    "sdxl": {"lora_te1_": 66, "lora_te2_": 192},  # the last layer of CLIP-L is above the states that are read
    "sd3": {"lora_te1_": 72, "lora_te2_": 192},
    "flux1": {"lora_te1_": 72},
}
"""Layers that learn, by the start of their keys in kohya's layout."""


@pytest.fixture(scope="module", params=slow_except(PREFIXES, "sd1", "flux1"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param in ("sd1", "sdxl"):
        found: Model = request.getfixturevalue({"sd1": "tiny", "sdxl": "sdxl"}[request.param])
        return found
    case = {"sd3": SD3, "flux1": FLUX1}[request.param]
    return case.loaded(case.saved(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def data(model: Model) -> EncodedDataset:
    """Pictures of one size whose captions are of one chunk of tokens, of several, and empty."""
    captions = ("a fox", "a (red:1.3) bus", "a penguin on a pink background, " * 20, "")
    latent = model.components.latent
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, caption in enumerate(captions):
        conditioning = model.family.sized(model.text_encoder.encode(caption), PictureSize((64, 64), (0, 0), (64, 64)))
        samples.append(Sample(torch.randn(latent.shape(64, 64), generator=generator), conditioning, f"{index}.png"))
    return EncodedDataset(tuple(samples))


def step(model: Model, data: EncodedDataset, *, fresh: bool = True, **settings: Any) -> tuple[Engine, Tensor]:
    plain = {"rank": 2, "targets": "attention", "training_dtype": "fp32", "batch_size": 4}
    job = plan_job(model.denoiser, TrainConfig(**(plain | settings)), "cpu")
    engine = engine_of(job)
    if not fresh:
        g = torch.Generator().manual_seed(0)
        engine.flat.master.add_(0.02 * torch.randn(len(engine.flat.master), generator=g))
    batches = batch_maker(job.model, data, job.config, engine.way).step(0)
    with engine.prepared():
        losses, _ = engine.gradient(batches)
    return engine, losses


@pytest.mark.slow_after(1)
def test_a_fresh_lora_has_the_loss_of_the_captions_as_they_are_cached(model: Model, data: EncodedDataset) -> None:
    _, cached = step(model, data)
    _, live = step(model, data, train_text_encoder=True)
    torch.testing.assert_close(live, cached, rtol=1e-6, atol=0)


def test_tokens_are_routed_as_with_cached_captions(model: Model, data: EncodedDataset) -> None:
    if model.family.routing is None:
        pytest.skip("a UNet")
    given = {"tread_rate": 0.5, "tread_first": 0, "tread_last": 1}
    _, cached = step(model, data, **given)
    _, live = step(model, data, train_text_encoder=True, **given)
    torch.testing.assert_close(live, cached, rtol=1e-6, atol=0)


def test_every_layer_that_has_an_adapter_learns(model: Model, data: EncodedDataset) -> None:
    engine, _ = step(model, data, fresh=False, train_text_encoder=True)
    norms = {name: float(engine.flat.view(engine.flat.grad, name).norm()) for name in engine.flat.parameters}
    of_text = {name: norm for name, norm in norms.items() if name.startswith("text_encoder")}
    assert len(of_text) == 2 * sum(PREFIXES[model.family.name].values())
    assert [name for name, norm in of_text.items() if norm == 0] == []


KEYS = {
    "sd1": ["clip_l"],
    "sdxl": ["clip_l", "clip_g"],
    "sd3": ["clip_l", "clip_g", "t5xxl"],
    "flux1": ["clip_l", "t5xxl"],
}
"""Of the vectors of a new word."""


@pytest.mark.slow_after(1)
def test_a_new_word_has_vectors_for_each_encoder(model: Model, data: EncodedDataset, tmp_path: Path) -> None:
    word: dict[str, Any] = {"new_word": "fox", "new_word_vectors": 3, "new_word_t5": True}
    tokens = len(model.components.tokenizers["text_encoder"]("fox", add_special_tokens=False).input_ids)
    same = {"new_word": "fox", "new_word_start": "fox", "new_word_vectors": tokens}
    _, live = step(model, data, **same)  # T5 reads it as text
    _, cached = step(model, data)
    torch.testing.assert_close(live, cached, rtol=1e-5, atol=1e-6)
    engine, _ = step(model, data, targets="none", **word)
    norms = {name: float(engine.flat.view(engine.flat.grad, name).norm()) for name in engine.flat.parameters}
    assert len(norms) == len(KEYS[model.family.name]) and min(norms.values()) > 0
    result = train(model, data, steps=1, targets="attention", rank=2, training_dtype="fp32", batch_size=4, **word)
    path = result.lora.save(tmp_path / "a.safetensors")
    loaded = Lora.load(path, model)
    assert list(loaded.state.words["fox"]) == sorted(KEYS[model.family.name])
    for key, one in result.lora.state.words["fox"].items():
        assert torch.equal(one, loaded.state.words["fox"][key])
    encoder = loaded.applied(None, model.text_encoder).encoder
    before, after = (one.encode("a fox").tensors for one in (model.text_encoder, encoder))
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow_after(1)
def test_files_have_the_keys_of_the_field_and_are_applied_as_they_were_trained(
    model: Model, data: EncodedDataset, tmp_path: Path
) -> None:
    result = train(
        model, data, steps=2, rank=2, targets="attention", training_dtype="fp32", lora_dtype="fp32", batch_size=4,
        train_text_encoder=True, text_encoder_rate=1e-2,
    )  # fmt: skip
    path = result.lora.save(tmp_path / "a.safetensors", layout="kohya")
    loaded = Lora.load(path, model)
    trained = {ref: one for ref, one in result.lora.state.adapters.items() if ref.component != DENOISER}
    for ref, weights in trained.items():
        assert torch.equal(loaded.state.adapters[ref].tensors["up"], weights.tensors["up"])
    keys = [key for key in _keys(path) if key.endswith(".lora_down.weight")]
    found = {start: sum(key.startswith(start) for key in keys) for start in PREFIXES[model.family.name]}
    assert found == PREFIXES[model.family.name]
    assert sum(found.values()) == len(trained)
    applied = loaded.applied(None, model.text_encoder)
    assert applied.note == ""
    with applied.encoder.active(torch.device("cpu")):
        after = applied.encoder.encode("a fox").tensors
    before = model.text_encoder.encode("a fox").tensors
    assert any(not torch.equal(after[name], before[name]) for name in before)


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_family_without_such_encoders_refuses(tmp_path: Path) -> None:
    from tiny_wan import WAN

    wan = WAN.loaded(WAN.saved(tmp_path))
    for setting in ("train_text_encoder", "new_word"):
        with pytest.raises(OptionError, match=f"{setting} needs a model with text encoders"):
            plan_job(wan.denoiser, TrainConfig(**{setting: True if setting == "train_text_encoder" else "x"}), "cpu")
