"""JSON from strangers: plain data, or a ValueError that says what it breaks."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.foreign_json import MAX_DEPTH, parse_foreign_json
from tests.processor_time import processor_time

INTEGERS = st.integers(-(2**63), 2**64 - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    SCALARS | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)


@given(VALUES, st.booleans())
def test_plain_data_is_read_as_json_does(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)

    assert parse_foreign_json(text) == parse_foreign_json(text.encode()) == json.loads(text)


def test_anything_else_is_a_value_error_that_names_the_rule() -> None:
    for text, rule in [
        ("[" * 100_000, "deeper than 100"),
        ("[" * 100_000 + "]" * 100_000, "deeper than 100"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeper than 100"),
        ('{"a":' * 300 + "1" + "}" * 300, "deeper than 100"),
        ("NaN", "not finite"),
        ('{"a": -Infinity}', "not finite"),
        ("[1e999]", "not finite"),
        ("9" * 5000, "beyond 64 bits"),
        (str(2**64), "beyond 64 bits"),
        (str(-(2**63) - 1), "beyond 64 bits"),
        ('{"a": 1, "a": 2}', "twice"),
        (r'["\ud800"]', "surrogate"),
        (r'{"\udc00": 1}', "surrogate"),
        ('"\ud800"', "UTF-8"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" + "[]," * 2_000_000 + "1]", "2,000,000 values"),
    ]:
        with pytest.raises(ValueError, match=rule):
            parse_foreign_json(text)


def test_infinities_can_be_let_in() -> None:
    assert parse_foreign_json("[-Infinity, 1e999]", finite=False) == [-math.inf, math.inf]
    with pytest.raises(ValueError, match="beyond 64 bits"):
        parse_foreign_json("9" * 5000, finite=False)


def test_the_deepest_value_pairs_of_surrogates_and_commas_in_text_are_read() -> None:
    assert parse_foreign_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_foreign_json(r'["\ud83d\ude00"]') == ["😀"]
    assert parse_foreign_json(json.dumps("," * 3_000_000)) == "," * 3_000_000


def test_time_is_proportional_to_length() -> None:
    with processor_time(at_most_s=1):
        parse_foreign_json(json.dumps({"tags": {f"tag {index}, \\": index for index in range(50_000)}}))
