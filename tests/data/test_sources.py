from __future__ import annotations

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import ImageSource


def test_a_source_in_one_text() -> None:
    for text, expected in [
        ("photos", ImageSource("photos")),
        ("  my photos  repeats=2 weight=0.5 ", ImageSource("my photos", 2, 0.5)),
        ("photos weight=0 repeats=10", ImageSource("photos", 10, 0.0)),
        ("a=b/ repeats=3", ImageSource("a=b/", 3)),
        ("data/x=1", ImageSource("data/x=1")),
    ]:
        assert ImageSource.parse(text) == expected


def test_what_is_no_source() -> None:
    for text, message in [
        ("", "must have a path, got an empty one"),
        ("repeats=2", "must have a path, got an empty one"),
        ("photos repeat=2", r"must be repeats=\.\.\. and weight=\.\.\., each once, got 'repeat=2' \(did you mean"),
        ("photos repeats=2 repeats=3", "each once, got 'repeats=2'"),
        ("photos repeats=0", "repeats must be between 1 and 10000, got 0"),
        ("photos repeats=1.5", "repeats must be an integer, got 1.5"),
        ("photos weight=x", "weight of a source must be a number, got 'x'"),
        ("photos weight=nan", "weight must be a number, got nan"),
        ("photos weight=-1", "weight must be between 0.0 and 100.0"),
    ]:
        with pytest.raises(OptionError, match=message):
            ImageSource.parse(text)


def test_settings_are_checked() -> None:
    with pytest.raises(OptionError, match="repeats must be between 1 and 10000"):
        ImageSource("photos", repeats=0)
