"""Tokenizers in the package: ids as those of the released tokenizers, which ComfyUI ships."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import ModelError
from lorasmith.families.parts.encoders import TokenizerSource, qwen_tokenizer, t5_tokenizer, tekken_tokenizer
from tests.families.tiny_flux2 import tekken_file

QWEN = {
    "a photo of a cat, it's 123 (good:1.3)": [
        *(64, 6548, 315, 264, 8251, 11, 432, 594, 220, 16, 17, 18, 320, 18536, 25, 16, 13, 18, 8)
    ],
    "<|im_start|>user\nhéllo<|im_end|>\n<think>\n\n</think>\n\n": [
        *(151644, 872, 198, 71, 18503, 385, 151645, 198, 151667, 271, 151668, 271)
    ],
    "日本語 🙂  tabs\t\tand\r\nnewlines\n\n  end ": [
        *(101059, 102819, 27484, 220, 22398, 197, 52477, 319, 931, 7969, 271, 220, 835, 220)
    ],
    "I'LL e\u0301": [40, 6, 4086, 3958],
    "": [],
}
T5 = {
    "a photo of a cat, it's 123 (good:1.3)": [
        *(3, 9, 1202, 13, 3, 9, 1712, 6, 34, 31, 7, 3, 14574, 41, 10452, 10, 13606, 61, 1)
    ],
    "日本語 🙂  tabs\t\tand\r\nnewlines\n\n  end ": [3, 2, 3, 2, 3808, 7, 11, 126, 6972, 414, 1],
    "I'LL e\u0301": [27, 31, 10376, 3, 154, 1],
    "": [1],
}


def test_qwen() -> None:
    for text, ids in QWEN.items():
        assert qwen_tokenizer()(text).input_ids == ids


def test_t5() -> None:
    for text, ids in T5.items():
        assert t5_tokenizer()(text).input_ids == ids


def test_mistrals_from_the_encoders_file_or_beside_it(tmp_path: Path) -> None:
    data = tekken_file()
    embedded = {"tekken_model": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
    inside = tekken_tokenizer(TokenizerSource(file=tmp_path / "mistral.safetensors", embedded=embedded))
    (tmp_path / "tekken.json").write_bytes(data)
    beside = tekken_tokenizer(TokenizerSource(file=tmp_path / "mistral.safetensors"))

    for tokenizer in (inside, beside):  # 1000 control tokens, then bytes, then "in" and "ing"
        assert tokenizer("[INST]sing é[/INST]").input_ids == [3, 1000 + ord("s"), 1257, 1032, 1195, 1169, 4]
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 11)


@pytest.mark.skipif(importlib.util.find_spec("mistral_common") is not None, reason="mistral-common is installed")
def test_a_vocabulary_that_is_nowhere_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"mistral\.safetensors needs Mistral's vocabulary, .* put tekken\.json"):
        tekken_tokenizer(TokenizerSource(file=tmp_path / "mistral.safetensors"))


def changed(**config: Any) -> bytes:
    content = json.loads(tekken_file())
    content["config"] |= config
    return json.dumps(content).encode()


def test_a_damaged_vocabulary_is_a_sentence(tmp_path: Path) -> None:
    for data in [
        b"",
        b"{}",
        b'{"config": {"pattern": "x"}}',
        b"[" * 10_000,
        changed(default_num_special_tokens=10**15),
        changed(default_vocab_size=10**15),
        changed(pattern="("),
        changed(pattern=None, default_num_special_tokens=-1),
        tekken_file().replace(b'"aW5n"', b'"' + b"aW5n" * 1000 + b'"'),
    ]:
        (tmp_path / "tekken.json").write_bytes(data)
        with pytest.raises(
            ModelError, match=r"tekken\.json (cannot be read as a tekken vocabulary|makes no tokenizer)"
        ):
            tekken_tokenizer(TokenizerSource(file=tmp_path / "mistral.safetensors"))


def test_sizes_and_padding() -> None:
    qwen, t5 = qwen_tokenizer(), t5_tokenizer()
    assert (len(qwen), qwen.pad_token_id) == (151669, 151643)
    assert (t5.pad_token_id, t5.eos_token_id) == (0, 1)
