from __future__ import annotations

from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.nodes import strings

TEXT = "Fox 12, cat 3\nfox 7"


@pytest.mark.parametrize(
    ("inputs", "result"),
    [
        ({"regex_pattern": r"FOX \d"}, True),
        ({"regex_pattern": r"FOX \d", "case_insensitive": False}, False),
        ({"regex_pattern": r"^fox 7$"}, False),
        ({"regex_pattern": r"^fox 7$", "multiline": True}, True),
        ({"regex_pattern": r"3.fox"}, False),
        ({"regex_pattern": r"3.fox", "dotall": True}, True),
    ],
)
def test_patterns_match(bench: Any, inputs: dict[str, Any], result: bool) -> None:
    assert bench.one("RegexMatch", string=TEXT, **inputs) is result


@pytest.mark.parametrize(
    ("pattern", "mode", "index", "result"),
    [
        (r"fox \d+", "First Match", 1, "Fox 12"),
        (r"dog", "First Match", 1, ""),
        (r"fox \d+", "All Matches", 1, "Fox 12\nfox 7"),
        (r"(\w+) (\d+)", "All Matches", 1, "Fox\ncat\nfox"),
        (r"(\w+) (\d+)", "First Group", 2, "12"),
        (r"(\w+) (\d+)", "First Group", 0, "Fox 12"),
        (r"(\w+) (\d+)", "First Group", 3, ""),
        (r"(\w+) (\d+)", "All Groups", 2, "12\n3\n7"),
        (r"\w+ \d+", "All Groups", 0, ""),
        (r"(dog)?fox", "First Group", 1, ""),
    ],
)
def test_patterns_extract_as_in_comfyui(bench: Any, pattern: str, mode: str, index: int, result: str) -> None:
    extracted = bench.one("RegexExtract", string=TEXT, regex_pattern=pattern, mode=mode, group_index=index)
    assert extracted == result


def test_patterns_replace(bench: Any) -> None:
    def replaced(**changes: Any) -> Any:
        given = {"string": TEXT, "regex_pattern": r"(\w+) (\d+)", "replace": r"\2 \1"}
        return bench.one("RegexReplace", **(given | changes))

    assert replaced() == "12 Fox, 3 cat\n7 fox"
    assert replaced(count=1) == "12 Fox, cat 3\nfox 7"
    assert replaced(replace="💐", count=0) == "💐, 💐\n💐"
    with pytest.raises(OptionError, match=r"must be a regular expression, got '\(': missing \)"):
        replaced(regex_pattern="(")
    with pytest.raises(OptionError, match=r"invalid group reference 3"):
        replaced(replace=r"\3")


def test_a_malformed_pattern_matches_nothing_with_a_word(bench: Any) -> None:
    assert bench.one("RegexMatch", string=TEXT, regex_pattern="(") is False
    assert bench.one("RegexExtract", string=TEXT, regex_pattern="(", mode="All Matches") == ""
    assert all(one.startswith("regex_pattern '(' matches nothing: missing )") for one in bench.messages("warning"))


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$"])
def test_a_pattern_that_would_take_forever_is_stopped(
    bench: Any, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strings, "_SECONDS", 0.7)
    with pytest.raises(OptionError, match=r"must match within 0\.7 seconds, but .* did not on 61 characters"):
        bench.call("RegexMatch", string="a" * 60 + "!", regex_pattern=pattern)
