"""Weighted words in prompts, `(word:1.2)`, with the meaning that they have in ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorasmith.families.base import Encoding

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
