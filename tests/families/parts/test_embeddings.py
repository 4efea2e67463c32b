"""`embedding:NAME` in prompts against ComfyUI's numbers (golden/make_embeddings.py), and what no prompt may read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_cases import WIDTH, named, vectors, written
from safetensors.torch import save_file
from test_clip_text import encoder, tokenizer
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import Folders
from lorasmith.families.parts.clip import encode_prompt, tokenize_prompt
from lorasmith.families.parts.embeddings import (
    EmbeddingFiles,
    FileKey,
    Vectors,
    VectorTokenizer,
    Word,
    has_word,
    vectors_read,
)
from lorasmith.families.parts.encoders import qwen_tokenizer, t5_tokenizer
from lorasmith.families.parts.language_models import t5_tokens
from lorasmith.families.z_image import _TEMPLATE

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("embeddings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base") / "models" / "embeddings")


def read(folder: Path, key: str, plain: Any, *words: Word, told: list[str] | None = None) -> VectorTokenizer:
    """A tokenizer that knows the files, and leaves out those that are missing."""
    files = EmbeddingFiles(Folders.of("embeddings", folder), [].append if told is None else told.append)
    return VectorTokenizer(plain, "component", Vectors(words, files, {"component": FileKey(key, WIDTH)}))


def shown(ids: list[int], reader: VectorTokenizer) -> list[Any]:
    """Ids, and vectors as the golden file has them."""
    rows = [row for rows in reader.rows for row in rows]
    return named([one if one >= 0 else rows[-1 - one] for one in ids])


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: case["prompt"][-40:])
def test_tokens_are_comfyuis(case: dict[str, Any], folder: Path) -> None:
    reader = read(folder, "clip_l", tokenizer("<|endoftext|>"))
    chunks = tokenize_prompt(case["prompt"], reader)
    assert [shown([token for token, _ in chunk], reader) for chunk in chunks] == [ids for ids, _ in case["clip_l"]]
    weights = [[weight for _, weight in chunk] for chunk in chunks]
    assert weights == [pytest.approx(expected) for _, expected in case["clip_l"]]
    reader = read(folder, "t5xxl", t5_tokenizer())
    assert shown([token for token, _ in t5_tokens(case["prompt"], reader)], reader) == case["t5xxl"]
    reader = read(folder, "qwen3_4b", qwen_tokenizer())
    assert shown(reader(_TEMPLATE.format(case["prompt"])).input_ids, reader) == case["qwen3_4b"]


@pytest.mark.parametrize("case", GOLDEN["encoded"], ids=lambda case: case["prompt"][-30:])
def test_encodings_are_comfyuis(case: dict[str, Any], folder: Path) -> None:
    reader, model = read(folder, "clip_l", tokenizer("<|endoftext|>")), encoder(True)
    layer = model.get_input_embeddings()
    before = layer.weight.clone()
    with vectors_read(layer, reader.rows):
        context, pooled = encode_prompt(case["prompt"], reader, model)
    assert "forward" not in vars(layer) and torch.equal(layer.weight, before)
    torch.testing.assert_close(context[0, :, :2].flatten(), torch.tensor(case["context"]), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(pooled.flatten(), torch.tensor(case["pooled"]), rtol=1e-4, atol=2e-5)


def test_vectors_take_the_places_of_tokens_and_alone_get_a_gradient() -> None:
    layer = nn.Embedding(10, 4)
    rows = [torch.ones(2, 4, requires_grad=True), torch.full((1, 4), 2.0, requires_grad=True)]
    layer.weight.requires_grad_(False)
    ids = torch.tensor([[3, -1, -2, -3, 3], [-1, 0, 0, 0, 0]])
    with vectors_read(layer, rows):
        states: Tensor = layer(ids)
    assert torch.equal(states[0, 1:4, 0], torch.tensor([1.0, 1.0, 2.0]))
    assert torch.equal(states[0, 0], layer.weight[3]) and torch.equal(layer(ids[:, :1].clamp(min=0))[0], states[0, :1])
    states.sum().backward()
    assert [one.grad.tolist() if one.grad is not None else None for one in rows] == [
        [[2.0] * 4, [1.0] * 4],
        [[1.0] * 4],
    ]


def test_words_are_whole_and_of_any_letter_case(folder: Path) -> None:
    word = Word("sks", {"component": vectors(3, 0)})
    reader = read(folder, "clip_l", tokenizer("<|endoftext|>"), word)
    groups = reader.groups("a SKS, sksy embedding:sks dog")
    assert [len(one) for one in groups if one[0] < 0] == [3, 3]
    assert groups[1] == groups[3]
    assert has_word("(sks:1.2)", "sks") and not has_word("desks", "sks")
    other = read(folder, "clip_l", tokenizer("<|endoftext|>"), Word("sks", {"another": vectors(1, 0)}))
    assert other("a sks dog").input_ids == tokenizer("<|endoftext|>")("a sks dog").input_ids


def test_what_is_missing_or_does_not_fit_is_said_once(folder: Path) -> None:
    told: list[str] = []
    reader = read(folder, "clip_l", tokenizer("<|endoftext|>"), told=told)
    reader.groups("embedding:nothing and embedding:nothing")
    save_file({"clip_l": torch.ones(2, 5)}, folder / "wide.safetensors")
    assert reader.groups("embedding:wide")[0] == []
    assert [one.partition(";")[0] for one in told] == [
        "no 'nothing' among the embeddings",
        "embedding:wide has no vectors of the width of clip_l (8), which reads the prompt without it",
    ]
    places = {"component": FileKey("clip_l", WIDTH)}
    strict = VectorTokenizer(
        tokenizer("!"), "component", Vectors((), EmbeddingFiles(Folders.of("embeddings", folder)), places)
    )
    with pytest.raises(ModelError, match=r"no 'nothing' among the embeddings; put its file into .*, or take"):
        strict.groups("embedding:nothing")
    with pytest.raises(ModelError, match=r"embedding:wide has no vectors of the width of clip_l \(8\); use one"):
        strict.groups("embedding:wide")


class _Ran:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a stranger",)


def test_no_file_runs_code_or_breaks_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.pt").write_bytes(pickle.dumps(_Ran()))
    torch.save({"string_to_param": {"*": vectors(1, 0)}, "other": _Ran()}, folder / "worse.pt")
    torch.save([1, {"a": "text"}], folder / "odd.bin")
    torch.save({1: 2, "bundle_emb.a.clip_l": torch.tensor(1.0)}, folder / "keys.pt")
    save_file({"clip_l": torch.full((1, WIDTH), float("nan"))}, folder / "nan.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "a.safetensors").mkdir()
    reader = read(folder, "clip_l", tokenizer("!"))
    for name in ("bad", "worse", "nan", "cut"):
        with pytest.raises(ModelError, match=r"; "):
            reader.groups(f"embedding:{name}")
    assert reader.groups("embedding:odd") == reader.groups("embedding:keys") == [[]]
    assert reader.groups("embedding:a") == reader.groups("embedding:" + "x" * 5000) == []
    assert capsys.readouterr().out == ""
