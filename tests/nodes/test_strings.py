from __future__ import annotations

from typing import Any

import pytest

from lorasmith.core.errors import OptionError


@pytest.mark.parametrize(
    ("node", "inputs", "result"),
    [
        ("StringConcatenate", {"string_a": "a", "string_b": "b", "delimiter": ", "}, "a, b"),
        ("StringSubstring", {"string": "a red fox", "start": 2, "end": -4}, "red"),
        ("StringLength", {"string": "füchse"}, 6),
        ("CaseConverter", {"string": "a RED fox", "mode": "Title Case"}, "A Red Fox"),
        ("CaseConverter", {"string": "a RED fox", "mode": "Capitalize"}, "A red fox"),
        ("CaseConverter", {"string": "fox", "mode": "UPPERCASE"}, "FOX"),
        ("CaseConverter", {"string": "FOX", "mode": "lowercase"}, "fox"),
        ("StringTrim", {"string": " \na\n ", "mode": "Both"}, "a"),
        ("StringTrim", {"string": " a ", "mode": "Left"}, "a "),
        ("StringTrim", {"string": " a ", "mode": "Right"}, " a"),
        ("StringReplace", {"string": "a fox, a fox", "find": "fox", "replace": "cat"}, "a cat, a cat"),
        ("StringContains", {"string": "a Fox", "substring": "fox", "case_sensitive": True}, False),
        ("StringContains", {"string": "a Fox", "substring": "fox", "case_sensitive": False}, True),
        ("StringCompare", {"string_a": "a fox", "string_b": "A", "mode": "Starts With"}, False),
        ("StringCompare", {"string_a": "a fox", "string_b": "FOX", "mode": "Ends With", "case_sensitive": False}, True),
        ("StringCompare", {"string_a": "a", "string_b": "a", "mode": "Equal"}, True),
        ("JsonExtractString", {"json_string": '{"a": 1.5, "b": null}', "key": "a"}, "1.5"),
        ("JsonExtractString", {"json_string": '{"a": 1.5, "b": null}', "key": "b"}, ""),
        ("JsonExtractString", {"json_string": "[1]", "key": "a"}, ""),
        ("StringFormat", {"values.a": 0.5, "values.b": "fox", "f_string": "{b}: {a:.2f} {{x}}"}, "fox: 0.50 {x}"),
        ("StringFormat", {"f_string": "no values"}, "no values"),
    ],
)
def test_text_is_what_comfyui_makes_of_it(bench: Any, node: str, inputs: dict[str, Any], result: Any) -> None:
    assert bench.one(node, **inputs) == result
    assert bench.messages("warning") == []


def test_what_is_no_json_gives_an_empty_text_and_a_word(bench: Any) -> None:
    assert bench.one("JsonExtractString", json_string="{", key="a") == ""
    assert bench.messages("warning") == ["json_string is no JSON, so the text is empty"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{c}", r"f_string names the value 'c', but there are a, b"),
        ("{}", r"f_string names the value .*, but there are a, b"),
        ("{a", r"must be a format of Python, got '{a'"),
        ("{a:x}", r"must be a format of Python"),
        ("{b.__class__}", r"reaches into a value"),
        ("{b[0]}", r"reaches into a value"),
        ("{a:>99999999}", r"is wider than 1,000,000 characters"),
        ("{a:>9999999999999999999999999999}", r"is wider than 1,000,000 characters"),
        ("{a:.99999999f}", r"is wider than 1,000,000 characters"),
        ("{a:{b}}", r"must be a format of Python"),
    ],
)
def test_formats_of_strangers_are_bounded(bench: Any, template: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        bench.call("StringFormat", **{"values.a": 0.5, "values.b": "fox", "f_string": template})
