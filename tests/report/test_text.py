from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.printable import printable
from lorasmith.report.contact_sheet import load_font, text_image, wrapped

FONT = load_font(14)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=80), st.integers(40, 200))
def test_lines_fit_and_lose_nothing_but_white_space(text: str, width: int) -> None:
    lines = wrapped(text, FONT, width, max_lines=10_000)
    assert "".join("".join(lines).split()) == "".join(printable(text).split())
    assert all(FONT.getlength(line) <= width or len(line) == 1 for line in lines)


def test_breaks_at_blanks_and_inside_long_words() -> None:
    assert wrapped("one two", FONT, 40, max_lines=5) == ["one", "two"]
    broken = wrapped("incomprehensibilities", FONT, 60, max_lines=9)
    assert len(broken) > 1 and "".join(broken) == "incomprehensibilities"


def test_cut_text_ends_in_an_ellipsis() -> None:
    lines = wrapped("word " * 50, FONT, 60, max_lines=2)
    assert len(lines) == 2 and lines[1].endswith("…") and FONT.getlength(lines[1]) <= 60


def test_picture_is_just_large_enough() -> None:
    assert text_image("", FONT, 100, colour="black", max_lines=2).size == (1, 1)
    one, two = (text_image(t, FONT, 60, colour="black", max_lines=5) for t in ("word", "word word word"))
    assert one.width <= 61 and two.height > one.height
    assert one.convert("L").getextrema()[0] < 60


def test_control_characters_are_shown() -> None:
    assert wrapped("a\x1b[0m \u202eb\ud800", FONT, 500, max_lines=5) == [r"a\u001b[0m \u202eb\ud800"]
    assert text_image("\ud800\x00", FONT, 500, colour="black", max_lines=1).width > 60
