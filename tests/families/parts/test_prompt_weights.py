"""Weighted words in prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.families.parts.encoders import literal_text, parse_weights, weighted_states
from lorasmith.families.slots import Encoding


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:inf)", [("a:inf", 1.1)]),
        (r"\\(a)", [("\\(a)", 1.0)]),
        ("(a:1e30)", [("a:1e30", 1.1)]),
        ("(" * 5000 + "a" + ")" * 5000, [("(" * 4968 + "a" + ")" * 4968, 1.1**32)]),
        ("", []),
    ],
)
def test_corners_of_the_grammar(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]


@given(st.text(alphabet="ab ():.1\\", max_size=40))
def test_parsing_loses_no_letter_and_never_fails(prompt: str) -> None:
    stretches = parse_weights(prompt)

    assert all(text for text, _ in stretches)
    letters = [letter for letter in prompt if letter in "ab"]
    assert [letter for text, _ in stretches for letter in text if letter in "ab"] == letters


def test_brackets_that_are_no_syntax_lose_their_backslash_in_comfyui_alone() -> None:
    prompt = r"saber_\(fate\), a (red:1.3) \\ hat"
    assert literal_text(prompt, Encoding()) == r"saber_(fate), a (red:1.3) \\ hat"
    assert literal_text(prompt, Encoding(lengths="diffusers")) == prompt


def test_states_move_away_from_the_empty_prompt_by_their_weight() -> None:
    states, empty = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[0.0], [1.0], [2.0]]])
    moved = weighted_states(states, empty, [[1.0, 1.5, 0.0]])
    assert moved.flatten().tolist() == [1.0, 2.5, 2.0]
