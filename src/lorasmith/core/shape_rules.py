"""Rules of shapes, by which algorithms declare which tensors make an adapter.

A rule names the dimensions of a tensor, and the rules of one adapter share their names:

    {"down": "rank in kernel...", "up": "out rank 1..."}

A name has the same size wherever it occurs, `a*b` is the product of two names that occurred before, a number is itself.
A last word that ends in three dots stands for up to three further dimensions; `1...` for dimensions of size 1. No
dimension may be of size 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_MORE = "..."
_MOST_FURTHER = 3


def first_misfit(shapes: Mapping[str, Sequence[int]], rules: Mapping[str, str]) -> tuple[str, str] | None:
    """The first tensor that breaks its rule, and the rule: `(out, rank, 1...) with rank 4`; None if there is none."""
    known: dict[str, tuple[int, ...]] = {}
    for name, rule in rules.items():
        before = dict(known)
        if not _follows(tuple(shapes[name]), rule.split(), known):
            return name, _in_words(rule.split(), before)
    return None


def _follows(shape: tuple[int, ...], words: Sequence[str], known: dict[str, tuple[int, ...]]) -> bool:
    """Whether a shape follows the words of its rule; sizes of new names are added to `known`."""
    rest = words[-1].removesuffix(_MORE) if words[-1].endswith(_MORE) else None
    single = words if rest is None else words[:-1]
    if 0 in shape or len(shape) < len(single) or (rest is None and len(shape) > len(single)):
        return False
    for word, size in zip(single, shape, strict=False):
        sizes = known.setdefault(word, (size,)) if word.isidentifier() else _product(word, known)
        if sizes != (size,):
            return False
    further = shape[len(single) :]
    if len(further) > _MOST_FURTHER:
        return False
    return rest is None or (set(further) <= {1} if rest == "1" else known.setdefault(rest, further) == further)


def _product(word: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return (math.prod(size for one in word.split("*") for size in ((int(one),) if one.isdigit() else known[one])),)


def _in_words(words: Sequence[str], known: Mapping[str, tuple[int, ...]]) -> str:
    names = dict.fromkeys(name for word in words for name in word.removesuffix(_MORE).split("*") if name in known)
    sizes = [f"{name} {' × '.join(map(str, known[name])) or 'empty'}" for name in names]
    return f"({', '.join(words)})" + (f" with {' and '.join(sizes)}" if sizes else "")
