from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.server.comfyui.file_routes import FileRoutes
from lorasmith.server.server_disk import SPARE_BYTES
from tests.processor_time import processor_time
from tests.server.fake_server import Played, serving
from tests.server.fakes import until

PNG = b"\x89PNG\r\n\x1a\nsome"


def put(path: Path, content: bytes = PNG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


async def upload(server: Played, name: str = "a.png", content: bytes = PNG, *, status: int = 200, **fields: Any) -> Any:
    form = aiohttp.FormData(quote_fields=False)
    for key, value in fields.items():
        form.add_field(key, value)
    form.add_field("image", content, filename=name, content_type="image/png")
    return await server.send("POST", "/upload/image", data=form, status=status)


async def test_files_are_sent_from_their_places(server: Played, tmp_path: Path) -> None:
    put(tmp_path / "output" / "sub" / "a.png", b"output")
    put(tmp_path / "input" / "a.png", b"input")
    put(tmp_path / "temp" / "a.png", b"temp")
    for query, content in (
        ("filename=a.png&subfolder=sub", "output"),
        ("filename=sub/a.png&type=output", "output"),
        ("filename=a.png&type=input", "input"),
        ("filename=a.png [temp]&type=input", "temp"),
        ("filename=a.png&type=temp&subfolder=", "temp"),
    ):
        async with server.http.get(f"/view?{query}") as answer:
            assert await answer.text() == content
            assert answer.content_type == "image/png"
    await server.get("/view?filename=b.png", status=404)
    picture = next((BUILT_IN_BASE / "input").rglob("*.png"))
    name = picture.relative_to(BUILT_IN_BASE / "input").as_posix()
    async with server.http.get("/view", params={"filename": name, "type": "input"}) as answer:
        assert await answer.read() == picture.read_bytes(), "pictures that come with the package are inputs"


async def test_what_a_browser_would_run_is_a_download(server: Played, tmp_path: Path) -> None:
    for name in ("a.html", "a.svg", "a.js", "a.xhtml", "a.css", "a.xml", "a.txt", "a", "a.pdf"):
        put(tmp_path / "output" / name, b"<script>alert(1)</script>")
        async with server.http.get(f"/view?filename={name}") as answer:
            assert answer.status == 200
            assert answer.content_type == "application/octet-stream"
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "sandbox" in answer.headers["Content-Security-Policy"]


OUTSIDE = [
    "filename=../secret.txt",
    "filename=..%2Fsecret.txt",
    "filename=..\\secret.txt",
    "filename=/etc/passwd",
    "filename=C:\\secret.txt",
    "filename=secret.txt&subfolder=..",
    "filename=secret.txt&subfolder=../",
    "filename=secret.txt&subfolder=/",
    "filename=secret.txt&subfolder=sub/../..",
    "filename=link.txt",
    "filename=secret.txt&subfolder=folder",
    "filename=a%00.png",
    "filename=a.png&type=other",
    "filename=a.png&type=../input",
    "filename=../secret.txt [input]",
    "filename=",
    "",
]


async def test_no_name_leads_out_of_its_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    put(tmp_path / "secret.txt", b"secret")
    put(base / "secret.txt", b"secret")
    (base / "output" / "sub").mkdir(parents=True)
    (base / "output" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (base / "output" / "folder").symlink_to(tmp_path)
    async with serving(base) as server:
        for query in OUTSIDE:
            async with server.http.get(f"/view?{query}") as answer:
                assert answer.status in (400, 403), query
                assert (await answer.json()).keys() == {"error"}


async def test_a_place_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    put(tmp_path / "disk" / "a.png", b"there")
    base.mkdir()
    (base / "input").symlink_to(tmp_path / "disk")
    async with serving(base) as server:
        async with server.http.get("/view?filename=a.png&type=input") as answer:
            assert await answer.read() == b"there"
        await upload(server, "b.png")
        assert (tmp_path / "disk" / "b.png").read_bytes() == PNG


async def test_channels_and_previews_are_made_by_the_assistant(server: Played, tmp_path: Path) -> None:
    path = put(tmp_path / "output" / "a.png")
    server.assistant.answers["encoded_picture"] = b"made"
    for query, wanted, kind in (
        ("preview=webp;90", {"channel": "rgba", "format": "webp", "quality": 90}, "image/webp"),
        ("preview=jpeg;50", {"channel": "rgba", "format": "jpeg", "quality": 50}, "image/jpeg"),
        ("preview=jpeg;50&channel=a", {"channel": "a", "format": "webp", "quality": 50}, "image/webp"),
        ("preview=exe;x", {"channel": "rgba", "format": "webp", "quality": 90}, "image/webp"),
        ("channel=rgb", {"channel": "rgb", "format": "png", "quality": 90}, "image/png"),
        ("channel=a", {"channel": "a", "format": "png", "quality": 90}, "image/png"),
    ):
        async with server.http.get(f"/view?filename=a.png&{query}") as answer:
            assert (await answer.read(), answer.content_type) == (b"made", kind)
        assert server.assistant.asked[-1] == ("encoded_picture", {"path": str(path), **wanted})


async def test_uploads_get_a_free_name_unless_they_are_the_same(server: Played, tmp_path: Path) -> None:
    assert await upload(server) == {"name": "a.png", "subfolder": "", "type": "input"}
    assert (await upload(server))["name"] == "a.png"
    assert (await upload(server, content=PNG + b"2"))["name"] == "a (1).png"
    assert (await upload(server, content=PNG + b"3", overwrite="true"))["name"] == "a.png"
    assert (tmp_path / "input" / "a.png").read_bytes() == PNG + b"3"
    sub = await upload(server, subfolder="one/two", type="temp")
    assert sub == {"name": "a.png", "subfolder": "one/two", "type": "temp"}
    assert (tmp_path / "temp" / "one" / "two" / "a.png").read_bytes() == PNG
    assert not any((tmp_path / "user" / "lorasmith" / "uploads").iterdir())
    listed = await server.get("/internal/files/input")
    assert {*listed} == {"a.png [input]", "a (1).png [input]"}
    assert (await upload(server, "../../b.png"))["name"] == "b.png"
    assert (await upload(server, "C:\\pictures\\c.png"))["name"] == "c.png"
    put(tmp_path / "input" / "Dog.PNG")
    assert (await upload(server, "dog.png"))["name"] == "Dog.PNG", "a name that differs by case alone is taken"
    assert (await upload(server, "dog.png", content=b"other"))["name"] == "dog (1).png"


async def test_what_an_upload_replaces_is_set_aside(server: Played, tmp_path: Path) -> None:
    record = put(tmp_path / "output" / "runs" / "dog-001" / "run.json", b"a record")
    picture = put(tmp_path / "input" / "dog" / "1.png", b"a photo")
    for _ in range(2):
        where = {"type": "output", "subfolder": "runs/dog-001", "overwrite": "true"}
        await upload(server, "run.json", content=b"forged", **where)
        await upload(server, "1.png", subfolder="dog", overwrite="1")
        await upload(server, "1.png", type="temp", overwrite="1", content=os.urandom(9))
    assert record.read_bytes() == b"forged" and picture.read_bytes() == PNG
    removed = (tmp_path / "user" / "lorasmith" / "removed").rglob("*")
    assert sorted(path.read_bytes() for path in removed if path.is_file()) == [b"a photo", b"a record"]


async def test_an_upload_reaches_a_folder_on_another_disk(
    server: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        if path.name == "file":
            raise OSError(errno.EXDEV, "another disk")
        return replace(path, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", refuse)
    await upload(server)
    assert (tmp_path / "input" / "a.png").read_bytes() == PNG


REFUSED: list[tuple[str, dict[str, str], int]] = [
    ("", {}, 400),
    (".htaccess", {}, 400),
    ("..", {}, 400),
    ("con.png", {}, 400),
    ("a.png", {"subfolder": "aux"}, 400),
    ("a\u202egnp.exe", {}, 400),
    ("x" * 300, {}, 400),
    ("a.png", {"type": "other"}, 400),
    ("a.png", {"type": "../output"}, 400),
    ("a.png", {"subfolder": "../.."}, 403),
    ("a.png", {"subfolder": "link"}, 403),
    ("a.png", {"subfolder": "one\0two"}, 403),
]


async def test_uploads_to_elsewhere_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "input").mkdir(parents=True)
    (base / "input" / "link").symlink_to(tmp_path)
    async with serving(base) as server:
        for name, fields, status in REFUSED:
            await upload(server, name, status=status, **fields)
        assert [path.name for path in (base / "input").iterdir()] == ["link"]
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


async def test_uploads_are_limited(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorasmith.server.request_handling.MOST_UPLOADS", 0)
        await upload(server, status=429)
    monkeypatch.setattr("lorasmith.server.comfyui.file_routes.MAX_UPLOAD_BYTES", 1000)
    await upload(server, content=b"x" * 1000)
    await upload(server, content=b"x" * 1001, status=413)
    await upload(server, subfolder="x" * 30_000, status=413)
    await server.post("/upload/image", {}, status=400)
    await server.send("POST", "/upload/image", data={"image": "text"}, status=400)
    form = aiohttp.FormData({"other": "x"}, default_to_multipart=True)
    await server.send("POST", "/upload/image", data=form, status=400)
    headers = {"Content-Type": "multipart/form-data"}
    await server.send("POST", "/upload/image", data=b"broken", headers=headers, status=400)
    zero = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a\0b.png"\r\n\r\nx\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    await server.send("POST", "/upload/image", data=zero, headers=headers, status=400)


async def test_a_mask_becomes_the_transparency_of_its_picture(server: Played, tmp_path: Path) -> None:
    import json

    original = put(tmp_path / "input" / "a.png")
    server.assistant.answers["masked_picture"] = b"masked"
    for reference, status in (
        ({"filename": "a.png", "subfolder": "", "type": "input"}, 200),
        ({"filename": "b.png", "type": "input"}, 404),
        ({"filename": "../../x.png"}, 400),
        ({"filename": "a.png", "type": 5}, 400),
        ([], 400),
    ):
        form = aiohttp.FormData({"original_ref": json.dumps(reference)}, default_to_multipart=True)
        form.add_field("image", PNG, filename="mask.png")
        answer = await server.send("POST", "/upload/mask", data=form, status=status)
        if status == 200:
            assert answer == {"name": "mask.png", "subfolder": "", "type": "input"}
            assert (tmp_path / "input" / "mask.png").read_bytes() == b"masked"
            assert server.assistant.asked[-1][1]["original"] == str(original)


def test_a_name_of_many_spaces_takes_no_time(tmp_path: Path) -> None:
    routes = FileRoutes(Folders(tmp_path), None)  # type: ignore[arg-type]
    with processor_time(at_most_s=1):
        assert routes._existing(f"a{' ' * 100_000}b", "", None) is None


async def test_files_of_a_place_are_listed_newest_first(server: Played, tmp_path: Path) -> None:
    assert await server.get("/internal/files/output") == []
    for name, at in (("old.png", 1000), ("new.png", 2000), (".hidden", 3000)):
        os.utime(put(tmp_path / "output" / name), (at, at))
    (tmp_path / "output" / "loop.png").symlink_to("loop.png")
    assert await server.get("/internal/files/output") == ["new.png [output]", "old.png [output]"]
    await server.get("/internal/files/user", status=400)


async def test_uploads_that_arrive_together_leave_the_last_of_the_disk(
    server: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3_000_000
    uploads = tmp_path / "user" / "lorasmith" / "uploads"

    def usage(folder: object) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file())
        least.append(room - used)
        return SimpleNamespace(free=SPARE_BYTES + room - used)

    least: list[int] = []
    monkeypatch.setattr("lorasmith.server.server_disk.shutil.disk_usage", usage)
    both = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"x" * 1_000_000
        await both.wait()  # both have begun while there was room
        for _ in range(20):
            yield b"x" * 100_000
            await asyncio.sleep(0)

    async def sent(server: Played, name: str) -> int:
        form = aiohttp.MultipartWriter("form-data")
        part = form.append(content())
        part.set_content_disposition("form-data", name="image", filename=name)
        async with server.http.post("/upload/image", data=form) as answer:
            return answer.status

    sending = [asyncio.create_task(sent(server, name)) for name in ("a.png", "b.png")]
    await until(lambda: sum(path.stat().st_size for path in uploads.rglob("file")) >= 1_000_000)
    both.set()
    assert sorted(await asyncio.gather(*sending))[-1] == 507
    assert min(least) >= 0
