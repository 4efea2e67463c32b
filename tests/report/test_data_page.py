"""The page about a folder, from plain data: whole and safe, whatever names and captions are."""

from __future__ import annotations

import re

import pytest

from lorasmith.report.data_page import DataReport, PictureCard, SizeRow, Trouble, data_page
from tests.report.test_run_report import HOSTILE, Page

URI = ("data:image/webp;base64,AAAA", 40, 30)


def page(**parts) -> Page:
    given = {"title": "photos", "status": "Fine", "mood": "good", "verdict": "All fine.", "summary": "512×512"}
    return Page(data_page(DataReport(**(given | parts))))


def shot(text: str = "a.png", **details) -> PictureCard:
    return PictureCard(**({"name": text, "about": "40×30", "picture": URI} | details))


def whole(text: str) -> dict:
    """Every part of a page, with `text` wherever text can be."""
    one = shot(text, about=text, caption=text, marks=[text], remarks=[text], crop=(0, 0.1, 1, 0.9), is_kept=True)
    trouble = {"title": text, "problem": text, "remedy": text}
    return {
        "title": text,
        "status": text,
        "mood": "fair",
        "verdict": text,
        "summary": text,
        "facts": {text: text},
        "troubles": [
            Trouble(**trouble, groups=[[one, one], [one]], is_grouped=True, more=3),
            Trouble(**trouble, files=[(text, text)]),
        ],
        "commands": {text: text},
        "sizes": [SizeRow(512, 512, 3, 9), SizeRow(256, 1024, 1, 1)],
        "sizes_are": text,
        "steps": {text: text},
        "captions": {text: text},
        "others": [one],
        "others_more": 2,
        "notes": [text],
    }


def test_no_text_becomes_markup() -> None:
    hostile, plain = page(**whole(HOSTILE)), page(**whole("plain"))
    assert hostile.tags == plain.tags and "script" not in hostile.tags
    assert [key for _, key, _ in hostile.attributes] == [key for _, key, _ in plain.attributes]
    assert HOSTILE in hostile.text
    assert {"script", "link", "iframe"}.isdisjoint(plain.tags)
    sources = [value or "" for _, key, value in plain.attributes if key in ("src", "href")]
    assert [one for one in sources if not one.startswith("data:")] == ["#look-1", "#look-2"]
    assert {"look-1", "look-2"} <= set(plain.ids) and len(set(plain.ids)) == len(plain.ids)
    assert plain.tags.count("img") == sum(key == "alt" and bool(value) for _, key, value in plain.attributes) == 4
    assert page().tags.count("section") == 0, "a page with nothing to look at"
    assert "Content-Security-Policy" in data_page(DataReport(**whole("plain")))


def test_the_crop_is_drawn_where_training_cuts() -> None:
    crop = shot(crop=(0.125, 0, 0.875, 1))
    found = page(troubles=[Trouble(title="t", problem="p", remedy="r", groups=[[crop, shot("b.png")]])])
    styles = [value for _, key, value in found.attributes if key == "style"]
    assert styles == ["left:12.50%;top:0.00%;width:75.00%;height:100.00%"]


@pytest.mark.parametrize("caption", ["", "a dog"])
def test_captions(caption: str) -> None:
    found = page(others=[shot(caption=caption, remarks=["too long"])])
    assert ("no caption" in found.text) == (not caption)
    assert "too long" in found.text and "1 picture with nothing to look at" in found.text


def test_pictures_that_could_not_be_read_are_marked() -> None:
    found = page(others=[shot(picture=None, marks=["blurred"])])
    assert "no picture" in found.text and "blurred" in found.text and "img" not in found.tags


def test_sizes_are_drawn_in_proportion() -> None:
    found = page(sizes=[SizeRow(512, 256, 4, 4), SizeRow(256, 512, 1, 5)], sizes_are="Pictures are scaled.")
    styles = [value for _, key, value in found.attributes if key == "style"]
    assert styles == ["width:40px;height:20px", "width:100.0%", "width:20px;height:40px", "width:25.0%"]
    assert "512×256" in found.text


def test_what_is_not_shown_is_counted() -> None:
    found = page(
        troubles=[Trouble(title="t", problem="p", remedy="r", groups=[[shot()]], more=1)],
        others=[shot()],
        others_more=40,
    )
    assert "1 more is not shown." in found.text and "40 more are not shown." in found.text
    assert "41 pictures with nothing to look at" in found.text


def test_flags_are_not_broken_at_hyphens() -> None:
    text = data_page(
        DataReport(
            title="x", status="s", mood="fair", verdict="v", summary="s",
            troubles=[Trouble(title="t", problem="p", remedy="use --no-upscale, <b> or --fix")],
        )
    )  # fmt: skip
    assert re.findall(r'<code class="flag">(.*?)</code>', text) == ["--no-upscale", "--fix"]
    assert "&lt;b&gt;" in text and "P.</p>" in text
