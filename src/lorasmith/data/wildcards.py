"""Choices in captions: `{a|b}` stands for `a` or `b`, and braces nest.

    a {red|blue} ball             two texts
    a {{dark|light} red|blue} ball    three: each alternative of a group is as likely as its others
    a ball{, on a beach|}         an alternative may be empty

A `|` outside of braces, braces without `|`, and unpaired braces are text. Nothing here recurses, as a caption may nest
thousands of braces.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

V = TypeVar("V")


class Choices:
    """The choices of a text; `groups` is the number of pairs of braces with alternatives."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._places = _places(text)
        self.groups = sum(text[place] == "{" for place in self._places)

    def resolved(self, numbers: Iterable[float]) -> str:
        """The text with an alternative of each group, chosen by a number in [0, 1) per group."""
        given = iter(numbers)
        return self._folded(str, "".join, lambda texts: texts[int(next(given) * len(texts))])

    def count(self, limit: int) -> int:
        """The number of ways to choose, capped at `limit` + 1. Equal texts count separately."""
        return self._folded(
            lambda text: 1,
            lambda counts: _product(counts, limit),
            lambda counts: min(sum(counts), limit + 1),
        )

    def expansions(self) -> frozenset[str]:
        """Every text; check `count` first, as time and memory are proportional to it."""
        return self._folded(
            lambda text: frozenset((text,)),
            lambda sets: frozenset(map("".join, itertools.product(*sets))),
            lambda sets: frozenset(itertools.chain(*sets)),
        )

    def _folded(
        self,
        literal: Callable[[str], V],
        joined: Callable[[Sequence[V]], V],
        either: Callable[[Sequence[V]], V],
    ) -> V:
        """Evaluate the text from the inside out, given the values of literals, sequences and groups."""
        text, start = self._text, 0
        outer: list[tuple[list[V], list[V]]] = []
        alternatives: list[V] = []
        parts: list[V] = []
        for place in self._places:
            if place > start:
                parts.append(literal(text[start:place]))
            start = place + 1
            if text[place] == "{":
                outer.append((alternatives, parts))
                alternatives, parts = [], []
                continue
            alternatives.append(joined(parts))
            parts = []
            if text[place] == "}":
                value = either(alternatives)
                alternatives, parts = outer.pop()
                parts.append(value)
        if start < len(text):
            parts.append(literal(text[start:]))
        return joined(parts)


def _places(text: str) -> list[int]:
    """Positions of the braces of groups and of the bars between their alternatives, in order."""
    found: list[int] = []
    open_groups: list[list[int]] = []  # places of an opening brace and of the bars after it
    for place, character in enumerate(text):
        if character == "{":
            open_groups.append([place])
        elif character == "|" and open_groups:
            open_groups[-1].append(place)
        elif character == "}" and open_groups:
            group = open_groups.pop()
            if len(group) > 1:
                found += [*group, place]
    return sorted(found)


def _product(counts: Iterable[int], limit: int) -> int:
    result = 1
    for one in counts:
        result = min(result * one, limit + 1)
    return result
