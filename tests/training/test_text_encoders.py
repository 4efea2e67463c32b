"""LoRAs on text encoders: their gradient against plain autograd, and everything that a run does with them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lever_cases import rounded
from torch import Tensor

import lorasmith_tiny
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.core.adapter_state import DENOISER
from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.data.encoding import load_dataset
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model, TextEncoder
from lorasmith.families.parts.clip import tokenize_prompt
from lorasmith.runs.library import train
from lorasmith.training.batches import captions_ready
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.events import CaptionsPlanned, Event
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.joint import check_alike
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable

SETTINGS: dict[str, Any] = {
    "rank": 2,
    "training_dtype": "fp32",
    "targets": "*.attn2.to_q",
    "batch_size": 3,
    "train_text_encoder": True,
}


def prepared_step(model: Model, data: EncodedDataset, **settings: Any) -> tuple[TrainJob, Engine]:
    """A job with adapters that are not the identity, and its engine."""
    job = plan_job(model.denoiser, TrainConfig(**(SETTINGS | settings)), "cpu")
    engine = engine_of(job)
    random = torch.randn(len(engine.flat.master), generator=torch.Generator().manual_seed(0))
    engine.flat.master.add_(random * 0.02)
    return job, engine


def gradient(job: TrainJob, engine: Engine, data: EncodedDataset) -> tuple[Tensor, Tensor]:
    batches = batch_maker(job.model, data, job.config, engine.way).step(0)
    with engine.prepared():
        losses, _ = engine.gradient(batches)
    return losses, engine.flat.grad.clone()


def tensors(result: TrainResult, *, of_text: bool) -> dict[str, Tensor]:
    adapters = result.lora.state.adapters.items()
    parts = {ref: one for ref, one in adapters if (ref.component != DENOISER) is of_text}
    return {f"{ref} {name}": tensor for ref, one in parts.items() for name, tensor in one.tensors.items()}


def of_text(result: TrainResult) -> dict[str, Tensor]:
    return tensors(result, of_text=True)


def of_denoiser(result: TrainResult) -> dict[str, Tensor]:
    return tensors(result, of_text=False)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_is_that_of_merged_weights(tiny: Model, dataset: EncodedDataset) -> None:
    data = EncodedDataset(tuple(one for one in dataset.samples if ":" not in (one.conditioning.text or "")))
    job, engine = prepared_step(tiny, data)
    losses, found = gradient(job, engine, data)
    encoder, tokenizer = tiny.components.text_encoders["text_encoder"], tiny.components.tokenizers["text_encoder"]
    (batch,) = batch_maker(job.model, data, job.config, engine.way).step(0)
    leaves, weights = {}, {name: one.float() for name, one in encoder.state_dict().items()}
    for path, adapter in job.text_adapters.items():
        down, up = (one.detach().clone().requires_grad_() for one in (adapter.down, adapter.up))  # type: ignore[operator]
        leaves[f"{path}.down"], leaves[f"{path}.up"] = down, up
        name = f"{path.partition('.')[2]}.weight"
        weights[name] = weights[name] + adapter.scale * up @ down  # type: ignore[operator]
    ids = [[token for token, _ in tokenize_prompt(text, tokenizer)[0]] for text in batch.conditioning.texts]
    with job.model.frozen(job.config, engine.way), adapters_attached(job.model.module, [engine.trained]):
        context = torch.func.functional_call(encoder, weights, (torch.tensor(ids),)).last_hidden_state
        prediction = job.model.predict(batch.noised, batch.level.time, Conditioning({"context": context}))
        kind = PARAMETERIZATIONS[job.model.diffusion.parameterization]
        expected = (prediction - kind.target(batch.clean, batch.noise, batch.level)).square().flatten(1).mean(1)
        grads = torch.autograd.grad(expected.mean(), list(leaves.values()))
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    engine.flat.grad.copy_(found)
    for name, grad in zip(leaves, grads, strict=True):
        own = engine.flat.view(engine.flat.grad, name)
        torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("lever", ["gradient_checkpointing", "lean", "selective", "host", "offloading", "int8", "nf4"])
def test_levers_of_memory_reach_the_encoders(
    tiny: Model, dataset: EncodedDataset, small_is_worth_it: None, lever: str
) -> None:
    settings: dict[str, Any] = {}
    if lever in ("lean", "selective", "host"):
        settings = {"activations": lever}
    elif lever in ("int8", "nf4"):
        settings = {"quantization": lever}
    elif lever == "gradient_checkpointing":
        settings = {lever: True}
    job, engine = prepared_step(tiny, dataset, **settings)
    engine.way = replace(engine.way, offloading=lever == "offloading")  # planning leaves it out on the CPU
    losses, found = gradient(job, engine, dataset)
    plain, other = prepared_step(tiny, dataset)
    if lever in ("int8", "nf4"):
        encoder = tiny.components.text_encoders["text_encoder"]
        with rounded(tiny.components.denoiser, lever), rounded(encoder, lever):
            expected = gradient(plain, other, dataset)
        torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found, expected[1], rtol=1e-2, atol=1e-4 * float(found.abs().max()))
    else:
        expected = gradient(plain, other, dataset)
        assert torch.equal(losses, expected[0]) and torch.equal(found, expected[1])


def test_the_frozen_model_of_a_method_has_frozen_encoders(tiny: Model, dataset: EncodedDataset) -> None:
    data = EncodedDataset(dataset.samples, EncodedCaptions(tiny.text_encoder.encode))
    job, engine = prepared_step(tiny, data, preserve="blank")
    _, whole = gradient(job, engine, data)
    plain, other = prepared_step(tiny, data)
    _, alone = gradient(plain, other, data)
    (batch,) = batch_maker(job.model, data, job.config, engine.way).step(0)
    assert job.model.encoders is not None

    def predicted() -> Tensor:
        return job.model.predict(batch.noised, batch.level.time, batch.texts["preserved"])

    engine.flat.zero()
    with job.model.frozen(job.config, engine.way):
        with torch.no_grad():
            kept = predicted()
        with (
            adapters_attached(job.model.module, [engine.trained]),
            adapters_attached(job.model.encoders, [Attached(job.text_adapters)]),
        ):
            (predicted() - kept).square().flatten(1).mean(1).mean().backward()
    engine.flat.collect()
    assert float(engine.flat.grad.norm()) > 0
    torch.testing.assert_close(whole, alone + engine.flat.grad, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_encoders_keep_their_weights_after_their_steps(tiny: Model, dataset: EncodedDataset) -> None:
    settings = SETTINGS | {"learning_rate": 1e-2, "weight_decay": 0.5, "lora_dtype": "fp32"}
    short = train(tiny, dataset, steps=1, **settings)
    stopped = train(tiny, dataset, steps=2, text_encoder_steps=1, **settings)
    assert equal(of_text(short), of_text(stopped))
    assert not equal(of_denoiser(short), of_denoiser(stopped))
    assert not equal(of_text(short), of_text(train(tiny, dataset, steps=2, **settings)))


def test_rates_and_ranks_of_their_own(tiny: Model, dataset: EncodedDataset) -> None:
    job = plan_job(tiny.denoiser, TrainConfig(**SETTINGS, learning_rate=1e-3, text_encoder_rank=3), "cpu")
    assert {job.learning_rates[path] for path in job.text_adapters} == {1e-4}
    assert {len(one.to_weights().tensors["down"]) for one in job.text_adapters.values()} == {3}
    given = SETTINGS | {"optimizer": "SGD", "text_encoder_rate": 7e-3}
    result = train(tiny, dataset, steps=1, learning_rate=1e-7, **given)
    assert result.lora.metadata["ss_text_encoder_lr"] == "0.007"
    text, denoiser = (
        max(float(tensor.abs().max()) for name, tensor in own.items() if name.endswith(" up"))
        for own in (of_text(result), of_denoiser(result))
    )
    assert text > 1e-6 > denoiser


def test_a_lora_is_continued_in_both_parts(tiny: Model, dataset: EncodedDataset, tmp_path: Path) -> None:
    settings = SETTINGS | {"lora_dtype": "fp32", "learning_rate": 1e-2}
    first = train(tiny, dataset, steps=1, text_encoder_rank=3, **settings)
    file = str(first.lora.save(tmp_path / "first.safetensors"))
    events: list[Event] = []
    second = train(tiny, dataset, steps=1, existing_lora=file, on_event=events.append, **settings)
    assert of_text(second).keys() == of_text(first).keys() and not equal(of_text(second), of_text(first))
    assert any("19 of its layers keep" in getattr(one, "message", "") for one in events)
    kept = train(tiny, dataset, steps=1, existing_lora=file, **{**settings, "train_text_encoder": False})
    assert equal(of_text(kept), of_text(first)), "untrained, they are saved as they were"
    whole = train(tiny, dataset, steps=2, text_encoder_rank=3, **settings)
    assert second.losses[0] == pytest.approx(whole.losses[1], rel=1e-4)


@pytest.fixture
def varied(tiny: Model, tmp_path: Path) -> EncodedDataset:
    """Pictures whose captions vary."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, source in enumerate(sorted((Path(lorasmith_tiny.__file__).parent / "input" / "fox").glob("*.png"))[:3]):
        shutil.copy(source, folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {{red|small}} fox, tag {number}, on a beach, at night")
    rules: dict[str, Any] = {"shuffle_tags": True, "wildcards": True, "caption_dropout": 0.2}
    return load_dataset(folder, tiny, resolution=64, trigger="sks", **rules)


def test_captions_that_vary_are_not_encoded_ahead(
    tiny: Model, varied: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    texts: list[str] = []
    again = TextEncoder.encode_again

    def encode_again(self: TextEncoder, batch: Conditioning, components: list[str]) -> Conditioning:
        texts.extend(batch.texts)
        return again(self, batch, components)

    def encode(self: object, *args: object) -> None:
        raise AssertionError("captions are encoded in the step")

    monkeypatch.setattr(TextEncoder, "encode_again", encode_again)
    monkeypatch.setattr(TextEncoder, "encode", encode)
    train(tiny, varied, steps=3, preserve="blank", on_event=events.append, **SETTINGS)
    assert not any(isinstance(event, CaptionsPlanned) for event in events)
    assert {"fox" in text for text in texts} == {True, False}
    assert len({text for text in texts if "fox" in text}) > 3


def test_captions_for_other_encoders_must_be_encoded_ahead(tiny: Model, varied: EncodedDataset) -> None:
    job = plan_job(tiny.denoiser, TrainConfig(**SETTINGS), "cpu")
    model = copy.copy(job.model)
    model.needs_captions = True  # as where one of several encoders is trained
    assert varied.captions is not None
    varied.captions.memory_bytes = 0
    quiet: dict[str, Any] = {"on_event": lambda event: None, "progress": lambda done, total: None}
    with (
        pytest.raises(OptionError, match="their variants take more than 0 MiB; raise caption_memory"),
        captions_ready(varied, job.draws, seed=0, model=model, **quiet),
    ):
        pass


@pytest.mark.slow
def test_the_encoder_alone_learns_and_is_validated(tiny: Model, dataset: EncodedDataset) -> None:
    pictures = tuple(
        Sample(torch.full((4, 8, 8), value), tiny.text_encoder.encode(word), f"{word}.png")
        for word, value in (("qxa", 1.0), ("qxb", -1.0))
    )
    data = EncodedDataset(pictures)
    result = train(
        tiny, data, validation=data, steps=40, rank=8, batch_size=2, targets="*mid_block*to_q lr=1e-7",
        training_dtype="fp32", train_text_encoder=True, text_encoder_rate=3e-2, seed=1,
    )  # fmt: skip
    assert result.base_loss is not None
    assert min(loss for _, loss in result.validations) < 0.9 * result.base_loss


def test_refusals_and_settings_without_effect(tiny: Model, dataset: EncodedDataset) -> None:
    width = dataset.samples[0].conditioning.tensors["context"].shape[-1]
    nameless = Sample(torch.zeros(4, 8, 8), Conditioning({"context": torch.zeros(1, 77, width)}), "x.png")
    with pytest.raises(DataError, match=r"train_text_encoder encodes the caption .* x\.png is unknown"):
        train(tiny, EncodedDataset((nameless,)), steps=1, **SETTINGS)
    job = plan_job(tiny.denoiser, TrainConfig(**SETTINGS), "cpu")
    with pytest.raises(OptionError, match="runs that train together share the model's text encoders"):
        check_alike([job, job])
    own = Trainable(torch.nn.Linear(4, 4))
    with pytest.raises(OptionError, match="train_text_encoder needs a model with text encoders"):
        plan_job(own, TrainConfig(train_text_encoder=True), "cpu")
    job = plan_job(tiny.denoiser, TrainConfig(text_encoder_steps=3), "cpu")
    assert "text_encoder_steps 3 has no effect without train_text_encoder." in job.notes
