"""Tokenizers of transformers whose ids are those of the library SentencePiece.

transformers converts a SentencePiece model for the library `tokenizers`, of whose ids some differ: it cuts a text at
special tokens first, and its normalization is another one. ComfyUI calls SentencePiece, as this module does.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class SentencePieceTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """A SentencePiece model, Unigram or BPE. Special tokens in a text are text."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, model: bytes, *, adds_bos: bool = False, adds_eos: bool = False) -> None:
        self._pieces = SentencePieceProcessor(model_proto=model)
        self.model_sha256 = hashlib.sha256(model).hexdigest()
        ids = {name: int(getattr(self._pieces, f"{name}_id")()) for name in ("pad", "bos", "eos", "unk")}
        needed = ("pad", *(["bos"] if adds_bos else ()), *(["eos"] if adds_eos else ()))
        if lacking := [name for name in needed if ids[name] < 0]:
            raise ValueError(f"it has no {' and no '.join(lacking)} token")
        self._before = [ids["bos"]] if adds_bos else []
        self._after = [ids["eos"]] if adds_eos else []
        named = {f"{name}_token": self._pieces.id_to_piece(id_) for name, id_ in ids.items() if id_ >= 0}
        super().__init__(clean_up_tokenization_spaces=False, **named)

    @property
    def vocab_size(self) -> int:
        return int(self._pieces.get_piece_size())

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {self._pieces.id_to_piece(index): index for index in range(self.vocab_size)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        # By ids, since a piece that is unknown would be the text's characters, which may spell another piece.
        return [self._pieces.id_to_piece(index) for index in self._pieces.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self._pieces.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self._pieces.decode([self._convert_token_to_id(token) for token in tokens]))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [*self._before, *token_ids_0, *self._after, *(token_ids_1 or ())]
