"""Cards are whole and escaped, whatever they show."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lorasmith.report.pictures import card, embedded_picture, embedded_png
from tests.training.run_cases import HOSTILE


def test_text_is_escaped_everywhere() -> None:
    shown = card(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, embedded_png(b"", HOSTILE))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 5


def test_empty_facts_are_left_out() -> None:
    shown = card("dog", {"rank": 8, "trigger": "", "file": None, "steps": 0})
    assert ">rank<" in shown and ">8<" in shown and ">steps<" in shown
    assert "trigger" not in shown and "file" not in shown


def test_pictures_are_embedded_and_missing_ones_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 10)).save(tmp_path / "wide.png")
    shown = embedded_picture(tmp_path / "wide.png", "a line")
    assert shown.startswith('<img src="data:image/webp;base64,') and 'alt="a line"' in shown
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert embedded_picture(tmp_path / "broken.png", "x") == embedded_picture(tmp_path / "none.png", "x") == ""
