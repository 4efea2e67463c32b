"""CLIP text encoding as ComfyUI does it: weighted words, prompts of any length, skipped layers.

Shared by the families with CLIP encoders. Prompts have the same meaning as in ComfyUI, so that a graph's captions train
and sample alike. Textual inversion is not supported: `embedding:name` is read as plain text.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.placement import device_of
from lorasmith.families.parts.prompt_weights import Token, parse_weights, weighted_states
from lorasmith.families.parts.tokenizers import byte_characters

CONTEXT_LENGTH = 77
"""Positions of a CLIP text encoder: begin, 75 tokens, end."""

VOCABULARY = 49408
"""Tokens of CLIP."""

_UNMERGED = 2 * 256 + 2  # single bytes, single bytes that end a word, begin and end

MAX_UNBROKEN = 8
"""A stretch of one weight with fewer tokens than this is moved to the next chunk rather than cut."""


@cache
def clip_tokenizer(*, pad_token: str = "<|endoftext|>", size: int = VOCABULARY) -> Any:
    """OpenAI's CLIP tokenizer from the vocabulary in the package, without a network.

    A `transformers.CLIPTokenizer` with `model_max_length` 77.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary(min(size, VOCABULARY))
    # From files, because every version of transformers reads those; constructor arguments changed with version 5.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(("#version: 0.2", *merges, "")), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder,
            model_max_length=CONTEXT_LENGTH,
            pad_token=pad_token,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )


def encode_prompt(
    text: str, tokenizer: Any, model: nn.Module, *, skip_layers: int = 0, final_norm: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Context and pooled vector of one prompt.

    Each chunk of 77 tokens is encoded separately and the contexts are joined. Where a token's weight is not 1, its
    vector is moved away from (or towards) the empty prompt's vector at the same position.

    Context (1, 77 · chunks, width) and pooled vector (1, width or projection) of the first chunk, in fp32 on the
    model's device. The pooled vector is that of the last layer even with skipped layers, and is projected if the model
    has a projection.
    """
    chunks = tokenize_prompt(text, tokenizer)
    weighted = any(weight != 1.0 for chunk in chunks for _, weight in chunk)
    rows = [[token for token, _ in chunk] for chunk in chunks]
    if weighted:
        rows.append([token for token, _ in tokenize_prompt("", tokenizer)[0]])
    hidden, pooled = _encoded(rows, model, skip_layers, final_norm)
    context = hidden[: len(chunks)]
    if weighted:
        context = weighted_states(context, hidden[-1:], [[weight for _, weight in chunk] for chunk in chunks])
    return context.reshape(1, -1, context.shape[-1]), pooled[:1]


def encode_prompts(
    prompts: Sequence[tuple[str, Any, nn.Module]], *, skip_layers: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Contexts, before the final norm, and pooled vectors of prompts for several encoders.

    The contexts have one length: shorter prompts continue with empty ones, as in ComfyUI.
    """

    def encoded(text: str, tokenizer: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        return encode_prompt(text, tokenizer, model, skip_layers=skip_layers, final_norm=False)

    contexts, pooled = map(list, zip(*(encoded(*prompt) for prompt in prompts), strict=True))
    tokens = max(context.shape[1] for context in contexts)
    for index, (_, tokenizer, model) in enumerate(prompts):
        while contexts[index].shape[1] < tokens:
            contexts[index] = torch.cat((contexts[index], encoded("", tokenizer, model)[0]), dim=1)
    return contexts, pooled


def tokenize_prompt(text: str, tokenizer: Any) -> list[list[Token]]:
    """Chunks of exactly 77 weighted tokens: begin, up to 75 tokens of the prompt, end, padding.

    A stretch of one weight that does not fit is cut, unless it has fewer than 8 tokens: then it starts the next chunk.
    """
    room = CONTEXT_LENGTH - 2
    chunks: list[list[Token]] = [[]]
    for stretch, weight in parse_weights(text):
        ids = tokenizer(stretch, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [(token, weight) for token in ids]
        if len(tokens) < MAX_UNBROKEN and len(chunks[-1]) + len(tokens) > room:
            chunks.append([])
        while tokens:
            free = room - len(chunks[-1])
            chunks[-1] += tokens[:free]
            tokens = tokens[free:]
            if tokens:
                chunks.append([])
    begin, end, pad = (
        (token, 1.0) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    return [[begin, *chunk, end, *[pad] * (room - len(chunk))] for chunk in chunks]


def _encoded(rows: list[list[int]], model: nn.Module, skip_layers: int, final_norm: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, 77, width) and pooled vectors (rows, ...), fp32."""
    # transformers 5.6 removed the level `text_model` from CLIPTextModel, not from CLIPTextModelWithProjection.
    core: Any = getattr(model, "text_model", model)
    with torch.no_grad():
        output = model(input_ids=torch.tensor(rows, device=device_of(model)), output_hidden_states=True)
        layers = output.hidden_states[1:]  # the first one is the embeddings
        hidden = layers[-1 - skip_layers] if skip_layers < len(layers) else layers[-1]
        if final_norm:
            hidden = core.final_layer_norm(hidden)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    return hidden.float(), pooled.float()


@cache
def _clip_vocabulary(size: int) -> tuple[dict[str, int], list[str]]:
    """Token → id, and the merges in order, as in OpenAI's `vocab.json` and `merges.txt`.

    The file holds a heading, CLIP's 48894 merges and more that it does not use. Tokens are numbered in this order:
    single bytes, single bytes that end a word, merged pairs, the two special tokens.
    """
    packed = resources.files("lorasmith").joinpath("assets/clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : size - _UNMERGED + 1]
    characters = byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges
