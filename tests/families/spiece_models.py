"""Small SentencePiece models, trained on a few sentences: one as UMT5's (Unigram), one as Gemma's (BPE of bytes)."""

from __future__ import annotations

import io
from functools import cache

from sentencepiece import SentencePieceTrainer

_SENTENCES = ("a photo of a cat sitting on the mat", "hello world, it's 123 things", "the quick brown fox (jumps:1.2)")
_IDS = {"pad_id": 0, "eos_id": 1}

MODELS = {
    "unigram": {"model_type": "unigram", "vocab_size": 45, "unk_id": 2, "bos_id": -1},
    "bpe": {
        "model_type": "bpe",
        "vocab_size": 320,
        "unk_id": 3,
        "bos_id": 2,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
}
"""Settings by kind."""


@cache
def spiece_model(kind: str) -> bytes:
    """A model of one of `MODELS`, as the content of its file."""
    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 10),
        model_writer=content,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **_IDS,
        **MODELS[kind],
    )
    return content.getvalue()
