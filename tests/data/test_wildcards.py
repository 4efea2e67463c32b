from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.captions import Choices

TEXTS = st.text(alphabet="{}|ab ,", max_size=14)


def test_every_text() -> None:
    for text, expected in [
        ("a ball", {"a ball"}),
        ("a {red|blue} ball", {"a red ball", "a blue ball"}),
        ("{a|{b|c}}d", {"ad", "bd", "cd"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("a{, b|}", {"a, b", "a"}),
        ("{|}", {""}),
        ("{a|a}", {"a"}),
        # Text: no bar, no pair, a bar outside.
        ("{a}", {"{a}"}),
        ("{}", {"{}"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("}{", {"}{"}),
        ("a|{b|c}", {"a|b", "a|c"}),
        ("{x {a|b}}", {"{x a}", "{x b}"}),
        ("{a|{b}", {"{a|{b}"}),
    ]:
        assert Choices(text).expansions() == expected


def test_each_alternative_of_a_group_is_as_likely_as_its_others() -> None:
    choices = Choices("{a|{b|c}}")
    steps = [(index + 0.5) / 20 for index in range(20)]
    found = [choices.resolved(numbers) for numbers in itertools.product(steps, repeat=choices.groups)]
    assert choices.groups == 2
    assert (found.count("a"), found.count("b"), found.count("c")) == (200, 100, 100)


@given(TEXTS, st.lists(st.floats(0, 1, exclude_max=True), min_size=7, max_size=7))
def test_what_is_chosen_is_listed_and_counted(text: str, numbers: list[float]) -> None:
    choices = Choices(text)
    expansions = choices.expansions()
    assert choices.resolved(numbers) in expansions
    assert len(expansions) <= choices.count(10**9)
    assert choices.count(3) == min(choices.count(10**9), 4)
    assert sum(map(len, expansions)) <= len(text) * choices.count(10**9)


@pytest.mark.parametrize("text", ["{a|" * 5000 + "}" * 5000, "{a|b}" * 5000, "{" * 20_000, "|" * 20_000])
def test_thousands_of_braces(text: str) -> None:
    choices = Choices(text)
    assert len(choices.resolved([0.0] * choices.groups)) <= len(text)
    assert choices.count(1000) in (1, 1001)
