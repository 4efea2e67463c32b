"""New words of text encoders: their gradient against plain autograd, files that programs read, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from test_text_encoders import gradient
from torch import Tensor

from lorasmith.adapters.inject import adapters_attached
from lorasmith.core.errors import DataError, LoraError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.data.encoder_digest import text_encoder_digest
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model, TextEncoder
from lorasmith.families.parts.clip import clip_tokenizer, tokenize_prompt
from lorasmith.families.parts.embeddings import EmbeddingFiles, Word
from lorasmith.formats.container import read_safetensors
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import Engine, batch_maker
from lorasmith.training.job import TrainJob, engine_of, plan_job
from lorasmith.training.joint import check_alike
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult, embedding_beside, lora_of
from lorasmith.training.trainable import Trainable

CAPTIONS = ("a sks dog", "SKS, a photo", "a cat", "two sks in a (sks:1.3) house", "a sksy dog", "sks")
SETTINGS: dict[str, Any] = {
    "rank": 2, "training_dtype": "fp32", "targets": "*.attn2.to_q", "batch_size": 3,
    "new_word": "sks", "new_word_vectors": 2,
}  # fmt: skip
WORD = "new_word.text_encoder"


@pytest.fixture(scope="module")
def data(tiny: Model) -> EncodedDataset:
    random = torch.Generator().manual_seed(0)
    samples = (
        Sample(torch.randn(4, 8, 8, generator=random), tiny.text_encoder.encode(text), f"{text}.png")
        for text in CAPTIONS
    )
    return EncodedDataset(tuple(samples), EncodedCaptions(tiny.text_encoder.encode))


def prepared_step(model: Model, **settings: Any) -> tuple[TrainJob, Engine]:
    """A job whose LoRA is not the identity, and its engine."""
    job = plan_job(model.denoiser, TrainConfig(**(SETTINGS | settings)), "cpu")
    engine = engine_of(job)
    engine.flat.master.add_(0.02 * torch.randn(len(engine.flat.master), generator=torch.Generator().manual_seed(0)))
    return job, engine


def test_the_gradient_is_that_of_a_larger_table(tiny: Model, data: EncodedDataset) -> None:
    plain = EncodedDataset(tuple(one for one in data.samples if ":" not in str(one.conditioning.text)))
    job, engine = prepared_step(tiny, batch_size=5)
    losses, found = gradient(job, engine, plain)
    encoder, tokenizer = tiny.components.text_encoders["text_encoder"], tiny.components.tokenizers["text_encoder"]
    (batch,) = batch_maker(job.model, plain, job.config, engine.way).step(0)
    vectors = engine.flat.parameters[WORD].detach().clone().requires_grad_()
    weights = {name: one.float() for name, one in encoder.state_dict().items()}
    (table,) = (name for name in weights if name.endswith("token_embedding.weight"))
    rows = len(weights[table])
    weights[table] = torch.cat((weights[table], vectors))
    # A word of one token stands in for the new one; its token becomes two rows behind the table.
    (token,) = tokenizer("fox", add_special_tokens=False).input_ids
    ids = []
    for text in batch.conditioning.texts:
        words = ["fox" if one.strip(",").casefold() == "sks" else one for one in text.replace(",", " ,").split()]
        chunk = [one for one, _ in tokenize_prompt(" ".join(words), tokenizer)[0]]
        ids.append([new for one in chunk for new in ((rows, rows + 1) if one == token else (one,))][:77])
    assert sum(one.count(rows) for one in ids) == 3
    with job.model.frozen(job.config, engine.way), adapters_attached(job.model.module, [engine.trained]):
        context = torch.func.functional_call(encoder, weights, (torch.tensor(ids),)).last_hidden_state
        prediction = job.model.predict(batch.noised, batch.level.time, Conditioning({"context": context}))
        kind = PARAMETERIZATIONS[job.model.diffusion.parameterization]
        expected = (prediction - kind.target(batch.clean, batch.noise, batch.level)).square().flatten(1).mean(1)
        (grad,) = torch.autograd.grad(expected.mean(), [vectors])
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    engine.flat.grad.copy_(found)
    own = engine.flat.view(engine.flat.grad, WORD)
    torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("lever", ["gradient_checkpointing", "lean", "host", "offloading", "int8"])
def test_levers_of_memory(tiny: Model, data: EncodedDataset, small_is_worth_it: None, lever: str) -> None:
    chosen: dict[str, Any] = {
        "gradient_checkpointing": {lever: True}, "offloading": {}, "int8": {"quantization": lever}
    }.get(lever, {"activations": lever})  # fmt: skip
    job, engine = prepared_step(tiny, train_text_encoder=True, **chosen)
    engine.way = replace(engine.way, offloading=lever == "offloading")
    found = gradient(job, engine, data)
    expected = gradient(*prepared_step(tiny, train_text_encoder=True), data)
    if lever == "int8":
        assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 0.1
    else:
        assert all(map(torch.equal, found, expected))


def vectors(result: TrainResult) -> Tensor:
    return result.lora.state.words["sks"]["clip_l"]


def test_a_word_is_learnt_alone_and_nothing_else_changes(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    before = {name: one.clone() for name, one in tiny.components.text_encoders["text_encoder"].state_dict().items()}
    alone = SETTINGS | {"targets": "none", "new_word_rate": 0.05}
    result = train(tiny, data, steps=3, output=tmp_path / "run", title="dog", **alone)
    after = tiny.components.text_encoders["text_encoder"].state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert not result.lora.state.adapters and vectors(result).shape == (2, tiny_width(tiny))
    assert result.path is not None
    assert list(read_safetensors(result.path)[0]) == ["bundle_emb.sks.clip_l"]
    beside, _ = read_safetensors(embedding_beside(result.path))
    assert list(beside) == ["clip_l"] and torch.equal(beside["clip_l"], vectors(result))
    assert result.path.with_name("dog_emb.safetensors").is_file()
    # The LoRA's word, the embedding beside it and the vectors in memory are one conditioning.
    by_lora = Lora.load(result.path, tiny).applied(None, tiny.text_encoder).encoder
    files = EmbeddingFiles(Folders.of("embeddings", result.path.parent))
    named = TextEncoder(tiny.family, tiny.components.encoders, "", embeddings=files)
    contexts = [
        encoder.encode(text).tensors["context"]
        for encoder, text in ((by_lora, "a sks"), (named, "a embedding:dog_emb"), (tiny.text_encoder, "a sks"))
    ]
    assert torch.equal(contexts[0], contexts[1]) and not torch.equal(contexts[0], contexts[2])
    assert torch.equal(by_lora.encode("a cat").tensors["context"], tiny.text_encoder.encode("a cat").tensors["context"])
    assert text_encoder_digest(by_lora) != text_encoder_digest(tiny.text_encoder)
    without = train(tiny, data, steps=1, output=tmp_path / "bare", **(SETTINGS | {"new_word_bundle": False}))
    assert without.path is not None and vectors(without).numel()
    assert not any(key.startswith("bundle_emb") for key in read_safetensors(without.path)[0])


def tiny_width(model: Model) -> int:
    place = model.text_encoder.place_of("text_encoder")
    assert place is not None
    return place.width


def test_prompts_are_cached_by_the_content_of_the_files_that_they_name(tiny: Model, tmp_path: Path) -> None:
    files = EmbeddingFiles(Folders.of("embeddings", tmp_path))
    encoder = TextEncoder(tiny.family, tiny.components.encoders, "", embeddings=files)
    found = []
    for value in (0.0, 0.1):
        save_file({"clip_l": torch.full((1, tiny_width(tiny)), value)}, tmp_path / "a.safetensors")
        found.append(encoder.vectors_in("a (embedding:a:1.2), embedding:a, text embedding:none"))
    assert found[0]["a"] != found[1]["a"] and found[0]["none"] == ""
    assert encoder.vectors_in("a prompt") == tiny.text_encoder.vectors_in("embedding:a") == {}
    caught = EncodedCaptions(encoder.encode, vectors=encoder.vectors_in)
    assert caught["embedding:a"].text == "embedding:a"


def test_a_start_rates_and_the_last_step(tiny: Model, data: EncodedDataset) -> None:
    layer = tiny.components.text_encoders["text_encoder"].get_input_embeddings()  # type: ignore[operator]
    (fox,) = tiny.components.tokenizers["text_encoder"]("fox", add_special_tokens=False).input_ids
    job, _ = prepared_step(tiny, new_word_start="fox", new_word_vectors=3, learning_rate=1e-3)
    word = job.model.word
    assert word is not None and torch.equal(
        plan_job(tiny.denoiser, job.requested, "cpu").model.word.vectors["text_encoder"],  # type: ignore[union-attr]
        layer.weight[[fox] * 3].float(),
    )
    assert job.learning_rates["new_word"] == pytest.approx(1e-2)
    random = plan_job(tiny.denoiser, TrainConfig(**(SETTINGS | {"new_word_vectors": 64})), "cpu").model.word
    assert random is not None
    assert float(random.vectors["text_encoder"].detach().std()) == pytest.approx(
        float(layer.weight.float().std()), rel=0.05
    )
    fast = SETTINGS | {"learning_rate": 1e-2, "weight_decay": 0.5}
    short, stopped = train(tiny, data, steps=1, **fast), train(tiny, data, steps=2, new_word_steps=1, **fast)
    assert torch.equal(vectors(short), vectors(stopped))
    assert not torch.equal(vectors(short), vectors(train(tiny, data, steps=2, **fast)))


def test_the_frozen_model_reads_the_word_as_text(tiny: Model, data: EncodedDataset) -> None:
    job, engine = prepared_step(tiny, preserve="blank")
    (batch,) = batch_maker(job.model, data, job.config, engine.way).step(0)

    def predicted() -> Tensor:
        with torch.no_grad():
            return job.model.predict(batch.noised, batch.level.time, batch.conditioning)

    with job.model.frozen(job.config, engine.way):
        frozen = predicted()
        with job.model.texts_read(1.0):
            trained = predicted()
    with engine.prepared(), engine._dial.turned(0.0):
        torch.testing.assert_close(predicted(), frozen, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(trained, frozen)


def test_a_lora_is_continued_with_its_word(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    settings = SETTINGS | {"lora_dtype": "fp32", "learning_rate": 1e-2}
    first = train(tiny, data, steps=1, **settings)
    file = str(first.lora.save(tmp_path / "first.safetensors"))
    second = train(tiny, data, steps=1, existing_lora=file, **settings)
    whole = train(tiny, data, steps=2, **settings)
    assert second.losses[0] == pytest.approx(whole.losses[1], rel=1e-4)
    assert not torch.equal(vectors(first), vectors(second))
    for changed in ({"new_word": "other"}, {"new_word_vectors": 3}):
        with pytest.raises(LoraError, match=r"first\.safetensors has those of sks \(2 for clip_l\), not"):
            train(tiny, data, steps=1, existing_lora=file, **(settings | changed))
    plain = {name: value for name, value in settings.items() if not name.startswith("new_word")}
    with pytest.raises(LoraError, match="has the word sks, without which it draws something else; set new_word"):
        train(tiny, data, steps=1, existing_lora=file, **plain)


class _Pipeline(TextualInversionLoaderMixin):
    hf_device_map = None
    components: ClassVar[dict[str, Any]] = {}


def test_diffusers_loads_the_embedding(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    result = train(tiny, data, steps=1, output=tmp_path / "run", **SETTINGS)
    assert result.path is not None
    encoder: Any = load_model(BUILT_IN).components.text_encoders["text_encoder"].float()  # diffusers changes it
    tokenizer: Any = clip_tokenizer.__wrapped__(size=encoder.get_input_embeddings().num_embeddings)
    _Pipeline().load_textual_inversion(
        str(embedding_beside(result.path)), token="sks", tokenizer=tokenizer, text_encoder=encoder
    )
    ids = tokenizer("a sks sks_1 cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(input_ids=ids).last_hidden_state
    mine = result.lora.applied(None, tiny.text_encoder).encoder.encode("a sks cat").tensors["context"]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_refusals(tiny: Model, data: EncodedDataset) -> None:
    silent = EncodedDataset(tuple(one for one in data.samples if "sks" not in str(one.conditioning.text).casefold()))
    with pytest.raises(DataError, match="new_word must be in captions, and sks is in none of 1 sample; set trigger"):
        train(tiny, silent, steps=1, **SETTINGS)
    job = plan_job(tiny.denoiser, TrainConfig(**SETTINGS), "cpu")
    with pytest.raises(OptionError, match=r"runs that train together share .*, got new_word; leave it out"):
        check_alike([job, job])
    with pytest.raises(OptionError, match="new_word needs a model with text encoders that learn words"):
        plan_job(Trainable(torch.nn.Linear(4, 4)), TrainConfig(new_word="sks"), "cpu")
    alone: dict[str, Any] = {"new_word": "sks", "targets": "none", "steps": 3}
    notes = plan_job(tiny.denoiser, TrainConfig(rank=3, new_word_vectors=2, learning_rate=1e-3, **alone), "cpu").notes
    assert "rank has no effect: there are no targets." in notes and "learning_rate" not in " ".join(notes)
    found = plan_job(tiny.denoiser, TrainConfig(new_word_vectors=3), "cpu")
    assert "new_word_vectors 3 has no effect without new_word." in found.notes


def test_words_of_files_for_other_encoders_are_noted(tiny: Model) -> None:
    plain = lora_of(plan_job(tiny.denoiser, TrainConfig(rank=1, targets="*.attn2.to_q"), "cpu"), {})
    wide = replace(plain, state=replace(plain.state, words={"sks": {"clip_l": torch.ones(1, 5)}}))
    applied = wide.applied(None, tiny.text_encoder)
    assert "bundle_emb.sks" in applied.note and applied.encoder.words == ()
    assert tiny.text_encoder.with_words([Word("sks", {})]).words
