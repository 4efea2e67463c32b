"""Tokenizers of SentencePiece models: ids as SentencePiece's own, of small models trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from lorasmith.core.errors import ModelError
from lorasmith.families.parts.encoders import TokenizerSource, spiece_tokenizer
from lorasmith.families.parts.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.families.spiece_models import MODELS, spiece_model

TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="a photofcat,12\n\t▁<s>/é日🙂", max_size=40),
    st.lists(st.sampled_from(["a photo", " cat", "<s>", "</s>", "<pad>", "<0x0A>", "  ", "\n", "ﬁ", "日"])).map(
        "".join
    ),
)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=40)
@given(text=TEXT)
def test_ids_are_sentencepieces_own(kind: str, text: str) -> None:
    data = spiece_model(kind)
    reference = SentencePieceProcessor(model_proto=data)
    tokenizer = SentencePieceTokenizer(data, adds_bos=kind == "bpe", adds_eos=kind == "unigram")
    ids = reference.encode(text)

    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer(text).input_ids == ([2, *ids] if kind == "bpe" else [*ids, 1])
    assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("kind", MODELS)
def test_special_tokens_and_padding(kind: str) -> None:
    tokenizer = SentencePieceTokenizer(spiece_model(kind), adds_bos=kind == "bpe", adds_eos=kind == "unigram")
    rows = tokenizer(["a cat", "a photo of a cat"], padding="max_length", max_length=20, return_tensors="pt")

    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert rows.input_ids.shape == (2, 20)
    assert rows.attention_mask.sum(dim=1).tolist() == [
        len(tokenizer(one).input_ids) for one in ("a cat", "a photo of a cat")
    ]
    assert (
        len(tokenizer)
        == len(tokenizer.get_vocab())
        == SentencePieceProcessor(model_proto=spiece_model(kind)).vocab_size()
    )


def embedded(data: bytes, **source: Path) -> TokenizerSource:
    return TokenizerSource(embedded={"spiece_model": torch.tensor(list(data), dtype=torch.uint8)}, **source)


def one_piece(length: int) -> bytes:
    """A model with a piece of this many characters, at which careless readers run out of stack."""

    def field(number: int, content: bytes) -> bytes:
        size, rest = [], len(content)
        while rest > 0x7F:
            size.append(rest & 0x7F | 0x80)
            rest >>= 7
        return bytes([number << 3 | 2, *size, rest]) + content

    return spiece_model("bpe") + field(1, field(1, b"a" * length))


def test_inside_the_encoders_file_or_beside_it(tmp_path: Path) -> None:
    data, file = spiece_model("bpe"), tmp_path / "gemma.safetensors"
    inside = spiece_tokenizer(embedded(data, file=file), file_name="tokenizer.model", rows=1000, adds_bos=True)
    (tmp_path / "tokenizer.model").write_bytes(data)
    beside = spiece_tokenizer(TokenizerSource(file=file), file_name="tokenizer.model", rows=1000, adds_bos=True)

    assert (
        inside("a cat").input_ids
        == beside("a cat").input_ids
        == [2, *SentencePieceProcessor(model_proto=data).encode("a cat")]
    )


def test_a_vocabulary_that_is_nowhere_is_a_sentence(tmp_path: Path) -> None:
    source = TokenizerSource(file=tmp_path / "gemma.safetensors")
    with pytest.raises(ModelError, match=r"gemma\.safetensors needs a vocabulary, .* put tokenizer\.model beside it"):
        spiece_tokenizer(source, file_name="tokenizer.model", rows=1000)


@pytest.mark.parametrize("data", [b"", b"x" * 100, spiece_model("bpe")[:500], one_piece(200_000)])
def test_a_damaged_vocabulary_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    source = embedded(data, file=tmp_path / "gemma.safetensors")
    with pytest.raises(ModelError, match=r"inside .*gemma\.safetensors cannot be read as a SentencePiece model \("):
        spiece_tokenizer(source, file_name="tokenizer.model", rows=1000)


def test_tensors_that_are_no_vocabulary_are_a_sentence(tmp_path: Path) -> None:
    for tensor in [torch.zeros(33 * 2**20, dtype=torch.uint8), torch.zeros(10, dtype=torch.bfloat16)]:
        source = TokenizerSource(embedded={"spiece_model": tensor}, file=tmp_path / "gemma.safetensors")
        with pytest.raises(
            ModelError, match=r"must be at most 33,554,432 bytes, but is .* as (uint8|bf16); get the file"
        ):
            spiece_tokenizer(source, file_name="tokenizer.model", rows=1000)


def test_that_of_another_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece_model("unigram"))
    source = TokenizerSource(file=tmp_path / "encoder.safetensors")
    with pytest.raises(ModelError, match=r"spiece\.model has \d+ tokens, but the encoder has 30; give the vocabulary"):
        spiece_tokenizer(source, file_name="spiece.model", rows=30)
    with pytest.raises(ModelError, match="it has no bos token"):
        spiece_tokenizer(source, file_name="spiece.model", rows=1000, adds_bos=True)
