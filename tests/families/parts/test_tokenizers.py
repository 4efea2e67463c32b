"""Tokenizers in the package: ids as those of the released tokenizers, which ComfyUI ships."""

from __future__ import annotations

import pytest

from lorasmith.families.parts.tokenizers import qwen_tokenizer, t5_tokenizer

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


@pytest.mark.parametrize(("text", "ids"), QWEN.items())
def test_qwen(text: str, ids: list[int]) -> None:
    assert qwen_tokenizer()(text).input_ids == ids


@pytest.mark.parametrize(("text", "ids"), T5.items())
def test_t5(text: str, ids: list[int]) -> None:
    assert t5_tokenizer()(text).input_ids == ids


def test_sizes_and_padding() -> None:
    qwen, t5 = qwen_tokenizer(), t5_tokenizer()
    assert (len(qwen), qwen.pad_token_id) == (151669, 151643)
    assert (t5.pad_token_id, t5.eos_token_id) == (0, 1)
