"""The text encoders of T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683) and UMT5 (Chung et al. 2023, arXiv:2304.09151).

UMT5 has T5's layout with biases by relative position in every block, and a larger vocabulary, which the package does
not have: ComfyUI's files of the encoder hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind, Token, parse_weights, weighted_states
from lorasmith.families.parts.tokenizers import TokenizerSource, folder_tokenizer, spiece_tokenizer, t5_tokenizer

RELEASED_PATHS = tuple(
    f"encoder.block.{block}.layer.{layer}"
    for block in range(24)
    for layer in (
        *(f"0.SelfAttention.{part}" for part in "qkvo"),
        *(f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    )
)
"""Paths of the layers of T5-XXL that a LoRA can change."""

T5_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
"""Name of a block's biases by relative position, which only the first block of T5 has."""

_EMBEDDING, _TIED = "shared.weight", "encoder.embed_tokens.weight"


class T5Encoder(EncoderKind):
    """T5 v1.1, of which image models use the XXL size."""

    name = "t5xxl"
    longest = 512

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        # UMT5 has a position bias in every block.
        return T5_BIAS.format(0) in shapes and T5_BIAS.format(1) not in shapes

    def width(self, encoder: Any) -> int:
        return int(encoder.config.d_model)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        return built_t5(source, lambda config: T5EncoderModel(T5Config(**config)))

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        return t5_tokenizer() if source.folder is None else folder_tokenizer(source.folder)


ENCODERS.register(T5Encoder.name)(T5Encoder())


def built_t5(source: PartSource, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """An encoder of T5's layout, with its embedding under both names that transformers gives it."""
    tensors = dict(source.tensors)
    embedding = tensors.get(_EMBEDDING, tensors.get(_TIED))
    if embedding is None:
        raise ModelError(f"{source.where} lacks {_EMBEDDING}; it is incomplete, so get it again")
    tensors |= {_EMBEDDING: embedding, _TIED: embedding}
    config = dict(source.config or _config(tensors) | dict(source.settings))
    encoder: Any = build(lambda: make(config), lambda _: tensors, where=source.where)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    return encoder  # type: ignore[no-any-return]


def encode_t5(
    text: str,
    tokenizer: Any,
    encoder: nn.Module,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    min_padding: int = 0,
    hides_padding: bool = False,
    empty_ends: bool = True,
) -> Tensor:
    """States after the last layer for one prompt, (1, tokens, width).

    Without a mask padding is encoded like text. The denoiser sees the length of the result.
    """
    tokens = t5_tokens(text, tokenizer, min_tokens=min_tokens, max_tokens=max_tokens, min_padding=min_padding)
    rows = [[token for token, _ in tokens]]
    weighted = any(weight != 1.0 for _, weight in tokens)
    if weighted:
        first = tokenizer.eos_token_id if empty_ends else tokenizer.pad_token_id
        rows.append([first, *[tokenizer.pad_token_id] * (len(tokens) - 1)])
    ids = torch.tensor(rows, device=device_of(encoder))
    mask = torch.ones_like(ids)
    if hides_padding:
        last = max(place for place, (token, _) in enumerate(tokens) if token != tokenizer.pad_token_id)
        mask[:, last + 1 :] = 0
    with torch.no_grad():
        states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return weighted_states(states[:1], states[1:], [[weight for _, weight in tokens]]) if weighted else states


def t5_tokens(
    text: str, tokenizer: Any, *, min_tokens: int = 1, max_tokens: int | None = None, min_padding: int = 0
) -> list[Token]:
    """The weighted tokens of one prompt, with the end and padding."""
    tokens = [
        (token, weight)
        for stretch, weight in parse_weights(text)
        for token in tokenizer(stretch, add_special_tokens=False).input_ids
    ]
    if max_tokens is not None:
        tokens = tokens[: max_tokens - 1]
    tokens.append((tokenizer.eos_token_id, 1.0))
    return tokens + [(tokenizer.pad_token_id, 1.0)] * max(min_padding, min_tokens - len(tokens))


def _config(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a T5 v1.1 encoder from its tensors."""
    vocabulary, width = tensors[_EMBEDDING].shape
    heads = tensors[T5_BIAS.format(0)].shape[1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": tensors["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"].shape[0],
        "d_kv": tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": block_count(tensors, "encoder.block."),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


class UMT5Encoder(EncoderKind):
    """UMT5, of which video models use the XXL size."""

    name = "umt5xxl"
    longest = 512

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return T5_BIAS.format(1) in shapes

    def width(self, encoder: Any) -> int:
        return int(encoder.config.d_model)

    def build(self, source: PartSource) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        # A file with its vocabulary has it among the tensors.
        tensors = {name: one for name, one in source.tensors.items() if name != "spiece_model"}
        part = PartSource(source.where, tensors, source.settings, source.config)
        return built_t5(part, lambda config: UMT5EncoderModel(UMT5Config(**config)))

    def tokenizer(self, encoder: Any, source: TokenizerSource) -> Any:
        if source.folder is not None:
            return folder_tokenizer(source.folder)
        return spiece_tokenizer(source, beside="spiece.model", rows=encoder.config.vocab_size, adds_eos=True)


ENCODERS.register(UMT5Encoder.name)(UMT5Encoder())


def encode_umt5(
    text: str,
    tokenizer: Any,
    encoder: nn.Module,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    min_padding: int = 0,
) -> Tensor:
    """States after the last layer for one prompt, and zeros for padding, (1, tokens, width).

    Padding is masked in the encoder, so that only the prompt has to be encoded.
    """
    tokens = t5_tokens(text, tokenizer, max_tokens=max_tokens)
    states = _states(encoder, [token for token, _ in tokens])
    weights = [weight for _, weight in tokens]
    if any(weight != 1.0 for weight in weights):
        # The empty prompt is the end alone; the rest of it is padding.
        empty = F.pad(_states(encoder, [tokenizer.eos_token_id]), (0, 0, 0, len(tokens) - 1))
        states = weighted_states(states, empty, [weights])
    return F.pad(states, (0, 0, 0, max(min_padding, min_tokens - len(tokens))))


@torch.no_grad()
def _states(encoder: nn.Module, tokens: list[int]) -> Tensor:
    """(1, tokens, width) in fp32."""
    states: Tensor = encoder(input_ids=torch.tensor([tokens], device=device_of(encoder))).last_hidden_state
    return states.float()
