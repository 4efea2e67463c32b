"""Text encoders: their contract, and weighted words in prompts, `(word:1.2)`, with ComfyUI's meaning."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import weight_source
from lorasmith.core.registry import Registry
from lorasmith.families.base import Encoding
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.parts.tokenizers import TokenizerSource, folder_tokenizer


class EncoderKind(ABC):
    """A kind of text encoder."""

    name: str  # registered name, as ComfyUI calls it
    longest: int  # tokens of a prompt that models with it were made for; longer ones are read, but worse
    dtype: torch.dtype | None = None  # in which it runs; None for that of its weights; packed and fp16 ones are bf16

    @abstractmethod
    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are the tensors of a file that holds such an encoder alone."""

    @abstractmethod
    def build(self, source: PartSource) -> nn.Module:
        """The encoder, from tensors in any naming in use. Raises ModelError if some are missing or of wrong shape."""

    def width(self, encoder: Any) -> int:
        """Width of its states."""
        return int(encoder.config.hidden_size)

    def width_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Width of the states of the encoder in a file with these tensors. Raises ModelError as `build`."""
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return self.width(self.build(PartSource("the file", tensors)))

    def tokenizer(self, encoder: nn.Module, source: TokenizerSource) -> Any:
        """Its tokenizer. Raises ModelError if there is none at the source."""
        rows = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return self.own_tokenizer(source, rows) if source.folder is None else folder_tokenizer(source.folder)

    @abstractmethod
    def own_tokenizer(self, source: TokenizerSource, rows: int) -> Any:
        """The tokenizer of an encoder that comes from a file, with this number of embeddings."""

    def dtype_of(self, encoder: nn.Module) -> torch.dtype:
        """The number format in which an encoder runs."""
        if self.dtype is not None:
            return self.dtype
        floats = {p.dtype for p in encoder.parameters() if p.is_floating_point()}
        is_plain = floats == {torch.float32} and not any(weight_source(layer) for layer in encoder.modules())
        return torch.float32 if is_plain else torch.bfloat16


ENCODERS: Registry[EncoderKind] = Registry("text encoder", ModelError)
"""Kinds by name; `families.known` imports the modules that register them."""


def recognised_encoder(shapes: Mapping[str, tuple[int, ...]]) -> EncoderKind | None:
    """The kind of encoder with these tensors; None if no registered kind recognises them."""
    return next((kind for _, kind in ENCODERS.items() if kind.recognises(shapes)), None)


EMPHASIS = 1.1
"""Factor of a pair of brackets that names no weight."""

_DEEPEST, _LARGEST = 32, 100

Token = tuple[int, float]
"""Token id and weight."""


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""The prompt cut into stretches of one weight.

    `(text)` multiplies the enclosing weight by 1.1, `(text:1.3)` sets the weight. Brackets nest; `\(` and `\)` are
    literal brackets. An unmatched bracket is text, and so are the innermost of more than 32 pairs, and a weight beyond
    100, which would make hidden states infinite.

    >>> parse_weights("a (red (very:1.5) big) cat")
    [('a ', 1.0), ('red ', 1.1), ('very', 1.5), (' big', 1.1), (' cat', 1.0)]
    """
    # Escaped brackets are replaced by control characters during parsing.
    guarded = text.replace(r"\(", "\x0e").replace(r"\)", "\x0f")
    return [(stretch.replace("\x0e", "(").replace("\x0f", ")"), weight) for stretch, weight in _weighted(guarded, 1.0)]


def literal_text(text: str, encoding: Encoding) -> str:
    r"""A prompt for a model that has no weighted words, where ComfyUI takes `\(` and `\)` for brackets all the same."""
    return text if encoding.lengths == "diffusers" else text.replace(r"\(", "(").replace(r"\)", ")")


def weighted_states(states: Tensor, empty: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Hidden states moved away from those of the empty prompt, or towards them.

    states: (prompts, tokens, width); empty: (1, tokens, width) of the empty prompt.
    """
    scale = states.new_tensor(weights).unsqueeze(-1)
    return torch.where(scale == 1, states, empty.lerp(states, scale))


def _weighted(text: str, weight: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    if depth == _DEEPEST:
        yield text, weight
        return
    for part in _outermost(text):
        if len(part) < 2 or not (part.startswith("(") and part.endswith(")")):
            yield part, weight
            continue
        content, _, number = part[1:-1].rpartition(":")
        explicit = _number(number) if content else None
        if explicit is None:
            yield from _weighted(part[1:-1], weight * EMPHASIS, depth + 1)
        else:
            yield from _weighted(content, explicit, depth + 1)


def _outermost(text: str) -> Iterator[str]:
    """`text` cut before and after each outermost pair of brackets, without empty pieces."""
    depth, start = 0, 0
    for bracket in re.finditer(r"[()]", text):
        opens = bracket.group() == "("
        cut = bracket.start() if opens else bracket.end()
        depth += 1 if opens else -1
        if depth == (1 if opens else 0):
            if cut > start:
                yield text[start:cut]
            start = cut
    if start < len(text):
        yield text[start:]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None  # NaN is not
