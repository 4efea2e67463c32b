"""A folder with everything that may be wrong with one is checked and trained on from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.data.captions import MAX_CAPTION
from tests.data.test_hostile_folder import BAD, GOOD

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names and files of POSIX systems")

SKIPPED = ("pipe.png", "loop.png", "long caption.png", "caption of a pipe.png", "sixteen.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in (*GOOD.items(), *((name, content) for name, (content, _) in BAD.items())):
        (photos / name).write_bytes(content)
    os.mkfifo(photos / "pipe.png")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "up").symlink_to(photos)
    (photos / "plain.txt").write_bytes("a café, in latin-1".encode("latin-1"))
    (photos / "cmyk.txt").write_text("in UTF-16", "utf-16")
    (photos / "sixteen.txt").write_bytes(b"zero\0byte")
    for name in ("long caption", "caption of a pipe"):
        (photos / f"{name}.png").write_bytes(GOOD["plain.png"])
    (photos / "long caption.txt").write_text("x" * (MAX_CAPTION + 1))
    os.mkfifo(photos / "caption of a pipe.txt")
    (photos / "alone.txt").write_text("of no image")
    (photos / "metadata.jsonl").write_text('{"file_name": "../../etc/passwd", "text": "a"}\n')
    return photos


def run(*arguments: object) -> str:
    ran = CliRunner().invoke(app, list(map(str, arguments)))
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return " ".join(ran.output.split())


@pytest.mark.slow
def test_it_is_checked_shown_mended_and_trained(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.html"
    said = run("data", "check", folder, "--report", page, "--fix", tmp_path / "mended", "--recursive")
    assert "Traceback" not in said and page.stat().st_size > 10_000
    trained = run(
        "train", folder, "--model", "lorasmith-tiny", "--steps", 2, "--resolution", 32, "--rank", 1, "--recursive",
        "--targets", "*mid_block*to_q", "--flip", "--output", "run",
    )  # fmt: skip
    assert f"{len(GOOD) - 1} images in" in trained and (tmp_path / "run" / "photos.safetensors").is_file()
    html = page.read_text("utf-8")
    for name in (*BAD, *SKIPPED):
        assert f"skipped {name}:" in trained, name
        assert name in html, name
    assert "alone.txt" in trained and "metadata files is not used" in trained and "latin-1" in trained
    again = run("data", "check", tmp_path / "mended", "--recursive")
    assert "cannot be used" not in again and "Traceback" not in again
