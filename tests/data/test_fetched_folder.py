"""Sources that lie elsewhere: URLs, of a store that fsspec opens or of the web, and ZIP files."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lorasmith.core.errors import DataError, LorasmithError, OptionError
from lorasmith.core.stores import checked_prefix
from lorasmith.data import fetched_folder
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.fetched_folder import local_folder, local_sources
from lorasmith.data.folder import scan_sources
from lorasmith.runs.spec import RunSpec
from tests.data.folder_cases import add_image

_REGISTRY: Any = sys.modules["fsspec.registry"]  # the package has a mapping of this name


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is behind s3://bucket."""

    class Store(LocalFileSystem):  # type: ignore[misc]
        protocol = "s3"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> Any:
            return super()._strip_protocol(str(path).replace("s3://bucket", str(tmp_path / "bucket")))

    (tmp_path / "bucket").mkdir()
    monkeypatch.setitem(_REGISTRY._registry, "s3", Store)
    return tmp_path / "bucket"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and its folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def foxes(folder: Path, *captions: str) -> Path:
    for number, caption in enumerate(captions):
        add_image(folder / f"{number}.png", caption, size=(32, 24 + number))
    return folder


def packed(folder: Path, archive: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as written:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                written.write(file, f"{inside}{file.relative_to(folder)}")
    return archive


def captions_of(path: str, cache: Path) -> list[str]:
    sources = local_sources([ImageSource(path)], DataConfig(), cache)
    return [image.caption for image in scan_sources(sources, DataConfig(), cache=cache).images]


def test_a_folder_of_a_store_is_fetched_once_for_each_state_of_its_files(bucket: Path, tmp_path: Path) -> None:
    foxes(bucket / "fox", "a fox", "two foxes")
    (bucket / "fox" / ".hidden").touch()
    url, cache = "s3://bucket/fox", tmp_path / "cache"
    folder = local_folder(url, cache, limit_gib=1)
    assert captions_of(url, cache) == ["a fox", "two foxes"]
    assert local_folder(url, cache, limit_gib=1) == folder
    (bucket / "fox" / "1.txt").write_text("many foxes")
    assert captions_of(url, cache) == ["a fox", "many foxes"]
    assert captions_of(str(folder), cache) == ["a fox", "two foxes"]


@pytest.mark.parametrize("inside", ["", "10_fox/"])
def test_an_archive_is_a_folder_also_on_the_web(web: tuple[str, Path], tmp_path: Path, inside: str) -> None:
    address, folder = web
    archive = packed(foxes(tmp_path / "fox", "a fox"), folder / "fox.zip", inside)
    for path in (str(archive), f"{address}/fox.zip"):
        assert captions_of(path, tmp_path / "cache") == ["a fox"]
        assert ImageSource(path).title == "fox"
    with pytest.raises(DataError, match=r"an address of the web must be that of a \.zip file"):
        local_folder(f"{address}/fox", tmp_path / "cache", limit_gib=1)
    with pytest.raises(DataError, match=r"none\.zip cannot be used"):
        local_folder(f"{address}/none.zip", tmp_path / "cache", limit_gib=1)


def test_a_run_keeps_the_address(bucket: Path) -> None:
    foxes(bucket / "fox", "a fox")
    spec = RunSpec(sources=(ImageSource("s3://bucket/fox"),), model="lorasmith-tiny").resolved()
    assert (spec.folder, spec.name) == ("s3://bucket/fox", "fox")
    assert "s3://bucket/fox" in spec.command()
    assert RunSpec.from_record(spec.to_record(), {}).folder == spec.folder


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("s3://bucket/none", "cannot be used|has no files"),
        ("ftp://host/fox", "pictures are at s3://, gs://, az://, https://, http://, got ftp://host/fox"),
        ("https::s3://bucket/fox", "pictures are at"),
    ],
)
def test_addresses_that_are_refused(bucket: Path, tmp_path: Path, path: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        fetched_folder._fetched(path, tmp_path / "cache")


def test_a_scheme_whose_package_is_missing_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"class": "no_such_package.Store", "err": "none"}
    monkeypatch.setitem(_REGISTRY.known_implementations, "gs", known)
    monkeypatch.delitem(_REGISTRY._registry, "gs", raising=False)
    with pytest.raises(DataError, match=r"gs:// needs a package; run pip install \"lorasmith\[gs\]\""):
        local_folder("gs://bucket/fox", tmp_path, limit_gib=1)


def test_a_transfer_that_breaks_off_leaves_nothing(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foxes(bucket / "fox", "a fox", "two foxes")
    monkeypatch.setattr(
        fsspec.get_filesystem_class("s3"), "get_file", lambda self, path, target: Path(target).write_bytes(b"")
    )
    with pytest.raises(DataError, match=r"has not all of its bytes.*credentials"):
        local_folder("s3://bucket/fox", tmp_path / "cache", limit_gib=1)
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "C:\\out.png", "a//out.png"])
def test_an_archive_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "fox.zip"
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(LorasmithError, match="no name here; rename it"):
        local_folder(str(archive), tmp_path / "cache", limit_gib=1)
    assert {path.name for path in tmp_path.iterdir()} == {"fox.zip", "cache"}
    assert not any((tmp_path / "cache").iterdir())


def test_links_in_an_archive_are_left_out_and_bombs_are_refused(tmp_path: Path) -> None:
    archive = packed(foxes(tmp_path / "fox", "a fox"), tmp_path / "fox.zip")
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as written:
        written.writestr(link, "/etc/passwd")
    assert captions_of(str(archive), tmp_path / "cache") == ["a fox"]
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as written:
        written.writestr("large.txt", bytes(2**27))
    with pytest.raises(DataError, match="unpacks to more than 20 times its size"):
        local_folder(str(archive), tmp_path / "cache", limit_gib=1)
    archive.write_bytes(b"PK, but damaged")
    with pytest.raises(DataError, match="cannot be unpacked"):
        local_folder(str(archive), tmp_path / "cache", limit_gib=1)


def test_the_cache_is_bounded_but_for_what_was_used_today(tmp_path: Path) -> None:
    cache, folders = tmp_path / "cache", []
    for number in range(3):
        archive = packed(foxes(tmp_path / f"fox{number}", "a fox"), tmp_path / f"fox{number}.zip")
        folders.append(local_folder(str(archive), cache, limit_gib=1))
    old = time.time() - 2 * 24 * 3600
    os.utime(folders[0], (old, old))
    local_folder(str(tmp_path / "fox2.zip"), cache, limit_gib=0)
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.mark.parametrize("url", ["s3://bucket", "bucket/", "s3:///", ""])
def test_an_address_that_is_allowed_ends_behind_its_host(url: str) -> None:
    with pytest.raises(OptionError, match="must have a host or bucket and end in /"):
        checked_prefix(url)
