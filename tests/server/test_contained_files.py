from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.server.contained_files import (
    BadNameError,
    OutsideError,
    checked_name,
    contained,
    find_contained,
    send_file,
)


@pytest.mark.parametrize("name", ["a", "a/b.png", "a\\b.png", "./a", "a//b", "ä ö/ü.png", "..a", "a..", ""])
def test_names_inside(tmp_path: Path, name: str) -> None:
    found = contained(tmp_path, name)
    assert found == tmp_path.resolve() or tmp_path.resolve() in found.parents


@pytest.mark.parametrize(
    "name", ["..", "../a", "a/../../b", "/a", "\\a", "C:/a", "c:a", "a\0b", "..\\a", "//host/share", "a/..", "file:a"]
)
def test_names_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutsideError):
        contained(tmp_path, name)
    with pytest.raises(OutsideError):
        contained(tmp_path, "sub", name)


def test_links_are_followed_to_where_they_lead(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "in").symlink_to(folder / "inner")
    (folder / "loop").symlink_to(folder / "loop")
    (tmp_path / "alias").symlink_to(folder)
    assert contained(folder, "in/a") == (folder / "inner" / "a").resolve()
    assert contained(tmp_path / "alias", "inner") == (folder / "inner").resolve()
    for name in ("out", "out/a", "in/../out"):
        with pytest.raises(OutsideError):
            contained(folder, name)
    assert find_contained([folder], "inner") is None
    with pytest.raises(OutsideError):
        contained(folder, "loop")


@pytest.mark.parametrize("name", ["con", "a/NUL.txt", "com1", "LPT¹.png", "conin$", "aux .x"])
def test_devices_of_windows_are_never_written_and_there_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(BadNameError, match="Windows has no files of the name"):
        contained(tmp_path, name, to_write=True)
    monkeypatch.setattr("lorasmith.server.contained_files.sys", SimpleNamespace(platform="linux"))
    assert contained(tmp_path, name) == tmp_path / name
    monkeypatch.setattr("lorasmith.server.contained_files.sys", SimpleNamespace(platform="win32"))
    with pytest.raises(BadNameError, match="Windows has no files of the name"):
        contained(tmp_path, name)


@given(st.text(max_size=20))
def test_no_text_leads_out(name: str) -> None:
    folder = Path("/nowhere/at/all")
    try:
        found = contained(folder, name)
    except OutsideError:
        return
    assert found == folder or folder in found.parents


@given(st.text(max_size=20))
def test_a_checked_name_is_one_part(name: str) -> None:
    try:
        found = checked_name(name)
    except BadNameError:
        return
    assert found not in ("", ".", "..")
    assert Path(found).name == found
    assert found.encode()


@pytest.mark.parametrize(
    "name", ["con", "NUL.txt", "com1.png", "a:b", "a*", "a\nb", ".a", "a.", "\ud800.png", "x" * 260]
)
def test_names_that_some_systems_lack(name: str) -> None:
    with pytest.raises(BadNameError):
        checked_name(name)


def test_only_pictures_films_and_sounds_are_shown(tmp_path: Path) -> None:
    shown = {"a.png", "a.JPG", "a.webp", "a.gif", "a.mp4", "a.webm", "a.mp3"}
    for name in [*shown, "a.html", "a.svg", "a.json", "a.safetensors", "a.png.html", "a"]:
        headers = send_file(tmp_path / name).headers
        assert headers["Content-Disposition"].startswith("inline" if name in shown else "attachment"), name
        assert (headers["Content-Type"] == "application/octet-stream") is (name not in shown)


def test_names_in_headers_are_quoted(tmp_path: Path) -> None:
    header = send_file(tmp_path / 'ü"\\.png').headers["Content-Disposition"]
    assert header == "inline; filename=\"___.png\"; filename*=UTF-8''%C3%BC%22%5C.png"
