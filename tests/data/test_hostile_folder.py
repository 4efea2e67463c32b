"""A folder with everything that may be wrong with one: each thing is named, and the good images are scanned."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.data.captions import MAX_CAPTION
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import FolderScan, scan_folder
from lorasmith.data.folder_listing import LINK
from lorasmith.data.image_files import open_image
from tests.data.folder_cases import add_image
from tests.processor_time import processor_time

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names and files of POSIX systems")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PLAIN = Image.linear_gradient("L").resize((40, 32))
FRAMES = [Image.new("RGB", (40, 32), (shade, 0, 0)) for shade in (10, 200)]


def gigapixels(width: int = 60_000, height: int = 60_000) -> bytes:
    """The header of a PNG, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD: dict[str, bytes] = {
    "plain.png": encoded(PLAIN, "PNG"),
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "apng.png": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "cmyk.jpg": encoded(PLAIN.convert("CMYK"), "JPEG"),
    "sixteen.png": encoded(Image.fromarray(np.full((32, 40), 40_000, np.uint16)), "PNG"),
    "floats.tiff": encoded(Image.fromarray(np.full((32, 40), 0.5, np.float32)), "TIFF"),
    "palette.png": encoded(PLAIN.convert("P"), "PNG", transparency=3),
    "one bit.png": encoded(PLAIN.convert("1"), "PNG"),
    "jpeg in truth.png": encoded(PLAIN, "JPEG"),
    "-rf.png": encoded(PLAIN, "PNG"),
    "--help.png": encoded(PLAIN, "PNG"),
    "two\nlines.png": encoded(PLAIN, "PNG"),
    "\x1b[31mred.png": encoded(PLAIN, "PNG"),
    "🦊 fox.png": encoded(PLAIN, "PNG"),
    os.fsdecode(b"caf\xe9.png"): encoded(PLAIN, "PNG"),
    "x" * 251 + ".png": encoded(PLAIN, "PNG"),
    "a;b $(c) 'd'.png": encoded(PLAIN, "PNG"),
}

BAD: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (encoded(PLAIN.resize((400, 400)), "JPEG")[:-300], "is damaged or cut short"),
    "truncated.png": (encoded(PLAIN.resize((400, 400)), "PNG")[:300], "is damaged or cut short"),
    "header.png": (b"\x89PNG\r\n\x1a\n", "is "),
    "gigapixels.png": (gigapixels(), "has more than 178 million pixels; scale it down first"),
    "zero.png": (gigapixels(0, 0), "is "),
    "empty.png": (b"", "is empty; get a good copy or remove it"),
    "text.png": (b"hello", "is not an image in spite of its name"),
    "page.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image in spite of its name"),
    "photo.psd": (b"8BPS", "is a PSD file, which is not read here; convert it"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (*GOOD.items(), *((name, content) for name, (content, _) in BAD.items())):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def reasons(scan: FolderScan) -> dict[str, str]:
    return {path.name: reason for path, reason in scan.skipped}


def test_each_bad_file_is_named_and_each_good_one_scanned(folder: Path) -> None:
    with processor_time(at_most_s=30):
        scan = scan_folder(folder)
        assert {image.path.name for image in scan.images} == GOOD.keys()
        found = reasons(scan)
        assert found.keys() == BAD.keys()
        assert [name for name, (_, reason) in BAD.items() if not found[name].startswith(reason)] == []
        for image in scan.images:
            assert open_image(image.path).size == (image.width, image.height) == (40, 32)


def test_what_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "plain.txt")
    os.mkfifo(folder / "metadata.json")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "zero device.png").symlink_to("/dev/zero")
    (folder / "cmyk.txt").symlink_to("/dev/zero")
    (folder / "up").symlink_to(folder)
    (folder / "2_up").symlink_to(folder)
    (folder / "folder.png").mkdir()
    (folder / "palette.txt").write_text("a caption of its own")
    scan = scan_folder(folder, DataConfig(recursive=True))
    assert [image.path.name for image in scan.images] == ["palette.png"]
    found = reasons(scan)
    expected = {
        "pipe.png": "cannot be read (it is a named pipe, not a file); replace or remove it",
        "plain.png": "is left out because its caption file plain.txt cannot be read (it is a named pipe, not a file); "
        "replace or remove it",
        "metadata.json": "cannot be read (it is a named pipe, not a file); repair or remove it",
        "loop.png": "cannot be read (Too many levels of symbolic links); replace or remove it",
        "gone.png": "does not exist; check the name",
        "zero device.png": f"{LINK}; copy it here",
        "cmyk.jpg": f"is left out because its caption file cmyk.txt {LINK}; copy that file here",
        "up": "is a link to a folder that is read already",
        "2_up": "is a link to a folder that is read already",
        "apng.png": "is left out because metadata.json cannot be read (it is a named pipe, not a file); repair or "
        "remove that file",
    }
    assert {name: found.get(name) for name in expected} == expected


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_image(tmp_path / "1.png", "a")
    closed = [add_image(tmp_path / "2.png", "b"), add_image(tmp_path / "3.png", "c").with_suffix(".txt")]
    for path in closed:
        path.chmod(0)
    if os.geteuid() == 0:  # who may read everything
        opened: Callable[..., int] = os.open

        def refused(path: Any, *rest: Any, **options: Any) -> int:
            if path in closed:
                raise PermissionError(13, "Permission denied")
            return opened(path, *rest, **options)

        monkeypatch.setattr(os, "open", refused)
    scan = scan_folder(tmp_path)
    assert [image.path.name for image in scan.images] == ["1.png"]
    assert reasons(scan) == {
        "2.png": "cannot be read; check the file's permissions",
        "3.png": "is left out because its caption file 3.txt cannot be read (Permission denied); replace or remove it",
    }


CAPTIONS: dict[str, tuple[bytes, str | None]] = {
    "utf-8": ("une fenêtre".encode(), "une fenêtre"),
    "utf-16": ("une fenêtre".encode("utf-16"), "une fenêtre"),
    "utf-16 without mark": ("une fenêtre".encode("utf-16-le"), None),
    "latin-1": ("une fenêtre".encode("latin-1"), "une fenêtre"),
    "zero bytes": (b"a\x00b", None),
    "only zero bytes": (bytes(100), None),
    "empty": (b"", ""),
    "too long": (b"x" * (MAX_CAPTION + 1), None),
    "picture": (encoded(PLAIN, "JPEG"), None),
    "blanks": (b" \r\n\t" * 1000, ""),
    "escapes": (b"\x1b[2J", "\x1b[2J"),
}


def test_caption_files(tmp_path: Path) -> None:
    for name, (content, _) in CAPTIONS.items():
        add_image(tmp_path / f"{name}.png").with_suffix(".txt").write_bytes(content)
    scan = scan_folder(tmp_path)
    assert {image.path.stem: image.caption for image in scan.images} == {
        name: text for name, (_, text) in CAPTIONS.items() if text is not None
    }
    found = reasons(scan)
    assert found.keys() == {f"{name}.png" for name, (_, text) in CAPTIONS.items() if text is None}
    assert all(reason.startswith("is left out because its caption file ") for reason in found.values())
    assert [note.partition(",")[0] for note in scan.notes] == [
        "1 caption file is not UTF-8 and read as latin-1",
    ]


def test_metadata_files(tmp_path: Path) -> None:
    hostile = {
        "metadata.json": (b"[" * 10**6, "has lists or objects nested deeper than 100"),
        "meta_deep.json": (b'{"1":' * 5000 + b"1" + b"}" * 5000, "has lists or objects nested deeper than 100"),
        "meta_many.json": (b'{"1": {"caption": [' + b"1," * 2_100_000 + b"1]}}", "has more than 2,000,000 values"),
        "metadata.jsonl": (b"\n" * 10**6 + b"{", "is not valid JSON in line 1000001"),
        "metadata.csv": (b'file_name,text\n1.png,"' + b"x" * 10**6, "is not valid CSV"),
        "meta_nan.json": (b'{"1": {"caption": NaN}}', "has a number that is not finite"),
        "meta_large.json": (b'{"1": {"caption": ' + b"9" * 10**6 + b"}}", "has an integer beyond 64 bits"),
    }
    for name, (content, reason) in hostile.items():
        folder = tmp_path / f"for {name}"
        add_image(folder / "1.png", "its own")
        add_image(folder / "2.png")
        (folder / name).write_bytes(content)
        with processor_time(at_most_s=20):
            scan = scan_folder(folder)
            assert [image.caption for image in scan.images] == ["its own"]
            assert reasons(scan)[name].startswith(reason)
            assert reasons(scan)["2.png"].startswith(f"is left out because {name} {reason}")


def test_links_to_themselves(tmp_path: Path) -> None:
    for stem in "12":
        add_image(tmp_path / f"{stem}.png")
    (tmp_path / "2.txt").write_text("its own")
    for name in ("metadata.jsonl", "1.txt", "meta_x.json"):
        (tmp_path / name).symlink_to(name)
    scan = scan_folder(tmp_path)
    assert [image.path.name for image in scan.images] == ["2.png"]
    loop = "cannot be read (Too many levels of symbolic links)"
    assert reasons(scan) == {
        "1.png": f"is left out because its caption file 1.txt {loop}; replace or remove it",
        "metadata.jsonl": f"{loop}; repair or remove it",
        "meta_x.json": "is not read besides metadata.jsonl; keep one of them",
    }


def test_metadata_reads_nothing_outside(tmp_path: Path) -> None:
    secret = add_image(tmp_path / "secret.png")
    photos = tmp_path / "photos"
    add_image(photos / "1.png")
    named = ["../secret.png", str(secret), "a/../../secret.png", "/dev/zero", "1.png", "1", "~/x.png"]
    (photos / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": f"of {name}"}) for name in named)
    )
    for scan in (scan_folder(photos), scan_folder(photos / "metadata.jsonl")):
        assert [(image.path, image.caption) for image in scan.images] == [(photos / "1.png", "of 1.png")]
        assert "4 entries of metadata files are not used, such as ../secret.png" in scan.notes[-1]


def test_masks(tmp_path: Path) -> None:
    for stem in "1234":
        add_image(tmp_path / f"{stem}.png")
    (tmp_path / "1.mask.png").write_bytes(gigapixels())
    os.mkfifo(tmp_path / "2.mask.png")
    (tmp_path / "3.mask.png").symlink_to("3.mask.png")
    scan = scan_folder(tmp_path, DataConfig(masks="files"))
    assert [image.path.name for image in scan.images] == ["4.png"]
    assert [reason.partition(";")[0] for _, reason in scan.skipped] == [
        "is left out because its mask 1.mask.png has more than 178 million pixels",
        "is left out because its mask 2.mask.png cannot be read (it is a named pipe, not a file)",
        "is left out because its mask 3.mask.png cannot be read (Too many levels of symbolic links)",
    ]
