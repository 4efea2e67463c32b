from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.server.comfyui.file_routes import FIRST_SETTINGS
from lorasmith.server.server_disk import SPARE_BYTES
from tests.server.fake_server import Played, serving

FILE = "/userdata/workflows%2Fone.json"


def set_aside(base: Path) -> dict[str, bytes]:
    """What was removed or replaced, by name."""
    found = (base / "user" / "lorasmith" / "removed").rglob("*")
    return {path.name: path.read_bytes() for path in found if path.is_file()}


async def test_workflows_are_written_read_listed_moved_and_set_aside(server: Played, tmp_path: Path) -> None:
    await server.get("/userdata?dir=workflows", status=404)
    await server.get("/userdata", status=400)
    info = await server.send("POST", f"{FILE}?overwrite=false&full_info=true", data=b'{"a": 1}')
    assert (info["path"], info["size"]) == ("workflows/one.json", 8)
    assert info["modified"] > 10**12
    await server.send("POST", f"{FILE}?overwrite=false", data=b"{}", status=409)
    assert await server.send("POST", FILE, data=b"{}") == "workflows/one.json"
    async with server.http.get(FILE) as answer:
        assert await answer.read() == b"{}"
        assert answer.headers["Content-Disposition"] == "attachment"
    await server.send("POST", "/api/userdata/workflows%2Fsub%2Ftwo.json", data=b"2")
    assert await server.get("/userdata?dir=workflows") == ["one.json"]
    assert await server.get("/userdata?dir=workflows&recurse=true") == ["one.json", "sub/two.json"]
    split = await server.get("/userdata?dir=workflows&recurse=true&split=true")
    assert split == [["one.json", "one.json"], ["sub/two.json", "sub", "two.json"]]
    full = await server.get("/userdata?dir=workflows&recurse=true&split=false&full_info=true")
    assert [one["path"] for one in full] == ["one.json", "sub/two.json"]
    moved = await server.send("POST", f"{FILE}/move/workflows%2Fthree.json?overwrite=false")
    assert moved == "workflows/three.json"
    await server.send("POST", f"{FILE}/move/x.json", status=404)
    await server.send("POST", FILE, data=b"1")
    await server.send("POST", f"{FILE}/move/workflows%2Fthree.json?overwrite=false", status=409)
    await server.send("DELETE", FILE, status=204)
    await server.send("DELETE", FILE, status=404)
    assert set_aside(tmp_path) == {"one.json": b"1"}
    listed = await server.get("/v2/userdata?path=workflows")
    assert [(one["path"], one["type"]) for one in listed] == [
        ("workflows/sub", "directory"),
        ("workflows/three.json", "file"),
        ("workflows/sub/two.json", "file"),
    ]


OUTSIDE = ["..%2Fx.json", "%2Fetc%2Fx", "..%5Cx.json", "%252e%252e%252fx.json", "link%2Fx.json", "a%00b", "C:%5Cx"]


async def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "user" / "default").mkdir(parents=True)
    (base / "user" / "default" / "link").symlink_to(tmp_path)

    def found() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if "lorasmith" not in path.relative_to(tmp_path).parts)

    before = found()
    async with serving(base) as server:
        for name in OUTSIDE:
            await server.send("GET", f"/userdata/{name}", status=403)
            await server.send("POST", f"/userdata/{name}", data=b"x", status=403)
            await server.send("DELETE", f"/userdata/{name}", status=403)
            await server.send("POST", f"/userdata/{name}/move/y.json", status=403)
            await server.send("GET", f"/userdata?dir={name}", status=404 if "%25" in name else 403)
        assert found() == before


async def test_a_page_is_never_served_as_one(server: Played) -> None:
    await server.send("POST", "/userdata/x.html", data=b"<script>alert(1)</script>")
    async with server.http.get("/userdata/x.html") as answer:
        assert answer.content_type == "application/octet-stream"
        assert answer.headers["Content-Disposition"] == "attachment"
    await server.send("POST", "/userdata/user.css", data=b"body {}")
    async with server.http.get("/userdata/user.css") as answer:
        assert answer.content_type == "text/css"


async def test_settings_are_merged_and_kept(server: Played, tmp_path: Path) -> None:
    first = await server.get("/settings")
    assert first == {"Comfy.Notification.ShowVersionUpdates": False}
    await server.post("/settings/Comfy.Locale", "en")
    await server.post("/settings", {"a": [1], "b": None})
    await server.send("POST", "/settings/c", data=b"true")
    assert await server.get("/api/settings") == first | {"Comfy.Locale": "en", "a": [1], "b": None, "c": True}
    assert await server.get("/settings/a") == [1]
    assert await server.get("/settings/none") is None
    await server.post("/settings", [], status=400)
    await server.send("POST", "/settings/a", data=b"{", status=400)
    saved = json.loads((tmp_path / "user" / "default" / "comfy.settings.json").read_text())
    assert saved["c"] is True


UNREAD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "no JSON": (b'{"Comfy.Keybinding": [1], "cut o', {}),
    "no object": (b"[1]", {}),
    "no text": (b"\xff\xfe{", {}),
    "with a mark": (b'\xef\xbb\xbf{"Comfy.Keybinding": [1]}', {"Comfy.Keybinding": [1]}),
    "with NaN": (b'{"Comfy.Keybinding": [1], "x": NaN}', {"Comfy.Keybinding": [1], "x": None}),
    "with a name twice": (b'{"Comfy.Keybinding": 2, "Comfy.Keybinding": [1]}', {"Comfy.Keybinding": [1]}),
    "deep": (b"[" * 10**5, {}),
    "large": (b" " * 10**7, {}),
}
"""Settings as another program left them, and what of them is read."""


@pytest.mark.parametrize("case", UNREAD)
async def test_settings_that_cannot_be_read_are_set_aside_before_others_are_written(
    server: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("lorasmith.server.comfyui.file_routes.MAX_JSON_BYTES", 10**6)
    content, read = UNREAD[case]
    file = tmp_path / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert await server.get("/settings") == FIRST_SETTINGS | read
    assert file.read_bytes() == content
    await server.post("/settings/Comfy.Locale", "en")
    assert json.loads(file.read_text()) == FIRST_SETTINGS | read | {"Comfy.Locale": "en"}
    await server.post("/settings/Comfy.Locale", "de")
    assert set_aside(tmp_path) == {"comfy.settings.json": content}


async def test_a_file_may_be_given_its_own_name_in_other_letters(server: Played, tmp_path: Path) -> None:
    """As on a file system that ignores case, where both names are of one file; a second link stands for that here."""
    await server.send("POST", FILE, data=b"1")
    (tmp_path / "user/default/workflows/One.json").hardlink_to(tmp_path / "user/default/workflows/one.json")
    moved = await server.send("POST", f"{FILE}/move/workflows%2FOne.json?overwrite=false")
    assert moved == "workflows/One.json" and set_aside(tmp_path) == {}


async def test_a_folder_is_not_overwritten_by_a_file(server: Played) -> None:
    await server.send("POST", FILE, data=b"1")
    await server.send("POST", "/userdata/workflows", data=b"1", status=400)
    await server.send("POST", f"{FILE}/move/workflows", status=400)
    await server.send("POST", "/userdata/workflows%2Fone.json%2Ftwo.json", data=b"1", status=400)
    await server.send("DELETE", "/userdata/workflows", status=404)


async def test_names_of_devices_are_refused(server: Played) -> None:
    await server.send("POST", FILE, data=b"1")
    for name in ("con", "NUL.json", "workflows%2Faux.x.json", "com1", "LPT%C2%B9", "CONIN$", "con%20.json"):
        said = await server.send("POST", f"/userdata/{name}", data=b"x", status=400)
        assert "Windows has no files of the name" in said["error"]
        await server.send("POST", f"{FILE}/move/{name}", status=400)
    await server.send("POST", "/userdata/workflows%2F.index.json", data=b"x")  # the editor's own
    await server.send("POST", "/userdata/workflows%2Fcontrast.json", data=b"x")


async def test_files_and_settings_leave_the_last_of_the_disk(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=SPARE_BYTES + 1000)
    monkeypatch.setattr("lorasmith.server.server_disk.shutil.disk_usage", lambda folder: free)
    await server.send("POST", FILE, data=b"x" * 1000)
    for path in (FILE, "/settings", "/settings/a"):
        await server.post(path, {"a": "x" * 1000}, status=507)
    await server.send("POST", "/settings", data=b'{"a": 1}')
    free.free = 0
    await server.send("DELETE", FILE, status=204)
