from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import DataError
from lorasmith.data.captions import MAX_CAPTION, one_line, read_caption, with_trigger


def caption_of(folder: Path, content: bytes, name: str = "a.txt"):
    (folder / name).write_bytes(content)
    return read_caption(folder / "a.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_with_and_without_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    caption = caption_of(tmp_path, "une fenêtre, 猫".encode(encoding))
    assert (caption.text, caption.is_latin_1) == ("une fenêtre, 猫", False)


def test_latin_1_is_read_and_reported(tmp_path: Path) -> None:
    caption = caption_of(tmp_path, "café à la crème".encode("latin-1"))
    assert (caption.text, caption.is_latin_1) == ("café à la crème", True)


def test_white_space_is_collapsed(tmp_path: Path) -> None:
    assert caption_of(tmp_path, b"  a dog,\r\n\ton  a\nbeach \n").text == "a dog, on a beach"


def test_which_file_is_taken(tmp_path: Path) -> None:
    assert read_caption(tmp_path / "a.png") is None
    assert caption_of(tmp_path, b"second", "a.caption").text == "second"
    caption = caption_of(tmp_path, b"first", "a.txt")
    assert (caption.text, caption.path) == ("first", tmp_path / "a.txt")


def test_empty_file_is_an_empty_caption(tmp_path: Path) -> None:
    assert caption_of(tmp_path, b" \n").text == ""


def test_dots_in_names(tmp_path: Path) -> None:
    (tmp_path / "v1.5 final.txt").write_text("a dog")
    assert read_caption(tmp_path / "v1.5 final.jpg").text == "a dog"


def test_with_trigger() -> None:
    for caption, trigger, expected in [
        ("on a beach", "sks dog", "sks dog, on a beach"),
        ("", "sks dog", "sks dog"),
        ("", "", ""),
        ("on a beach", "", "on a beach"),
        ("a photo of SKS  Dog, sitting", " sks dog", "a photo of SKS Dog, sitting"),
        ("a catalogue", "cat", "cat, a catalogue"),
        ("a cat", "cat", "a cat"),
        ("<sks>", "<sks>", "<sks>"),
        ("a (b", "a (b", "a (b"),
    ]:
        assert with_trigger(caption, trigger) == expected


@given(st.text(), st.text())
def test_trigger_is_there_and_only_once_added(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert " ".join(trigger.split()).casefold() in once.casefold()
    assert with_trigger(once, trigger) == once


def test_a_caption_longer_than_any_is_refused_by_name(tmp_path: Path) -> None:
    assert len(caption_of(tmp_path, b"x" * MAX_CAPTION).text) == MAX_CAPTION
    with pytest.raises(DataError, match=r"a\.txt has more than 20,000 characters; shorten or remove it"):
        caption_of(tmp_path, b"x" * (MAX_CAPTION + 1))
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(it has more than 80,000 bytes\)"):
        caption_of(tmp_path, b"x" * 10**7)


def test_a_caption_that_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(it is a folder, not a file\); replace or remove it"):
        read_caption(tmp_path / "a.png")


def test_names_that_are_not_unicode_become_text() -> None:
    assert one_line("caf\udce9  x\n") == "caf? x"
    assert with_trigger("\udcff", "a") == "a, ?"
