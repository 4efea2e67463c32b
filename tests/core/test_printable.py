"""Text of any origin is one printable line of bounded length."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import DataError, GraphError, LorasmithError
from lorasmith.core.printable import MAX_SENTENCE, printable, sentence
from tests.processor_time import processor_time

HOSTILE = "\x1b]0;title\x07\x9b31m\r\n\u202eevil\u2028\ud800\U000e0041\x7f\ufeff\xad"
OBEYED = frozenset("\n\r\t\x1b\x07\x9b\x7f\u2028\u2029\u202a\u202e\u2066\u2069\u200e\ud800\udfff\U000e0041")


@given(st.text(st.characters() | st.sampled_from(sorted(OBEYED))))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)

    assert not OBEYED & set(shown)
    assert shown.isprintable() or not any(ord(one) < 32 or 127 <= ord(one) < 160 for one in shown)
    assert printable(shown) == shown


def test_escapes_are_those_of_json() -> None:
    assert printable("a\x1b[0mb\nc\u202e") == r"a\u001b[0mb\nc\u202e"
    assert json.loads(f'"{printable(HOSTILE)}"') == HOSTILE


def test_text_of_any_script_stays_as_it_is() -> None:
    for text in ["é ü 日本語 العربية", "👩‍👩‍👧 ❤️", "a\u200cb", "[/]", "\u00a0"]:
        assert printable(text) == text


def test_the_middle_of_long_text_is_left_out() -> None:
    assert printable("x" * 50 + "y" * 50, limit=10) == "xxxx…yyyyy"
    assert printable("\x1b" * 10, limit=12) == r"\u001…\u001b"
    assert printable("a\nb", keep="\n") == "a\nb"


@given(st.text(max_size=3000), st.text(max_size=400))
def test_every_error_is_one_line_of_at_most_three_hundred_characters(value: str, other: str) -> None:
    error = str(DataError(f"{value} must be {other!r}, got {value!r}; use {other}"))

    assert len(error) <= MAX_SENTENCE
    assert not OBEYED & set(error)


@pytest.mark.parametrize(
    "value", ["/folder" * 200 + "/a.png", "many words " * 200, "x" * 10**7, "\x1b" * 10**7, "'\"" * 10**6]
)
def test_rule_and_remedy_survive_a_long_value_in_little_time(value: str) -> None:
    with processor_time(at_most_s=1):
        error = str(DataError(f"rank must be an integer, got {value!r}; use one of at most 64 or leave the layer out"))
    assert error.startswith("rank must be an integer, got ")
    assert error.endswith("; use one of at most 64 or leave the layer out")
    assert "…" in error


def test_the_name_of_a_file_survives_a_long_path() -> None:
    path = "/" + "/".join(f"folder-{index}" for index in range(100)) + "/dog.safetensors"

    assert "/dog.safetensors is cut short" in sentence(f"{path} is cut short; download it again")


def test_a_short_message_is_not_changed() -> None:
    text = "no 'a b' among loras (did you mean 'c'?); put it into /models/loras or choose one that is there"
    assert str(LorasmithError(text)) == text


def test_a_workflow_has_a_line_for_each_of_its_first_findings() -> None:
    error = GraphError("this workflow cannot run", tuple(f"node {index}: \x1b" + "x" * 900 for index in range(60)))
    first, *lines = str(error).split("\n")

    assert first == "this workflow cannot run"
    assert [line[:9] for line in lines[:2]] == ["  - node ", "  - node "]
    assert max(map(len, lines)) <= MAX_SENTENCE + len("  - ")
    assert lines[-1] == "  and 10 more"
    assert "\x1b" not in str(error)
    assert len(error.findings) == 60
