"""The editor's static files are served from its package, or a page says how to install it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from lorasmith.server.comfyui import editor_files
from lorasmith.server.comfyui.editor_files import EDITOR_POLICY
from tests.launched import needs_editor
from tests.server.fake_server import serving


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as the static files of the editor's package."""
    root = tmp_path / "package" / "static"
    for name, text in {
        "index.html": "<!doctype html><title>the editor</title>",
        "assets/index-1.js": "export {}",
        "assets/font.woff2": "font",
        "assets/images/favicon_progress_16x16/frame_0.png": "png",
        "scripts/app.js": "export const app = 1",
        "materialdesignicons.min.css": "a {}",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    (root.parent / "secret.txt").write_text("secret", "utf-8")
    (root / "link.txt").symlink_to(root.parent / "secret.txt")
    return root


def answers(base: Path, *paths: str | URL) -> list[tuple[int, str, str, dict[str, str]]]:
    """Status, type, text and headers of each answer."""

    async def ask() -> list[tuple[int, str, str, dict[str, str]]]:
        found = []
        async with serving(base) as server:
            for path in paths:
                async with server.http.get(path, allow_redirects=False) as answer:
                    found.append((answer.status, answer.content_type, await answer.text(), dict(answer.headers)))
        return found

    return asyncio.run(ask())


def test_the_packages_files_are_served_as_they_are(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_files, "editor_package", lambda: package)
    page, script, font, styles, icon = answers(
        tmp_path / "base",
        "/editor/",
        "/editor/assets/index-1.js",
        "/editor/assets/font.woff2",
        "/editor/materialdesignicons.min.css",
        "/assets/images/favicon_progress_16x16/frame_0.png",
    )
    assert page[:3] == (200, "text/html", (package / "index.html").read_text("utf-8"))
    assert page[3]["Cache-Control"] == "no-store"
    assert page[3]["Content-Security-Policy"] == script[3]["Content-Security-Policy"] == EDITOR_POLICY
    assert "http" not in EDITOR_POLICY and "frame-ancestors 'none'" in EDITOR_POLICY
    assert script[:3] == (200, "text/javascript", "export {}")
    assert [one[:2] for one in (font, styles, icon)] == [(200, "font/woff2"), (200, "text/css"), (200, "image/png")]


def test_the_page_is_in_a_folder_and_the_protocol_below_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_files, "editor_package", lambda: package)
    redirect, encoded, protocol, unknown = answers(
        tmp_path / "base",
        "/editor?template=style",
        URL("/editor?a=%26%0d%0aSet-Cookie:%20a=b", encoded=True),
        "/editor/api/users",
        "/editor/api/no_such_thing",
    )
    assert (redirect[0], redirect[3]["Location"]) == (307, "/editor/?template=style")
    assert (encoded[0], encoded[3]["Location"]) == (307, "/editor/?a=%26%0d%0aSet-Cookie:%20a=b")
    assert protocol[:2] == (200, "application/json")
    assert unknown[0] == 404


@pytest.mark.parametrize(
    "path", ["link.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "assets/..%2f..%2fsecret.txt", "assets", "gone.js"]
)
def test_nothing_outside_the_package_is_served(
    path: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_files, "editor_package", lambda: package)
    ((status, _, text, _),) = answers(tmp_path / "base", f"/editor/{path}")
    assert (status, "secret" in text) == (404, False)


def test_the_users_style_sheet_is_served_or_an_empty_one(tmp_path: Path) -> None:
    own = tmp_path / "user" / "default" / "user.css"
    paths = ("/editor/user.css", "/editor/api/userdata/user.css")
    assert [one[:3] for one in answers(tmp_path, *paths)] == [(200, "text/css", "")] * 2
    own.parent.mkdir(parents=True)
    own.write_text("body { color: red }", "utf-8")
    assert [one[2] for one in answers(tmp_path, *paths)] == ["body { color: red }"] * 2


def test_without_the_package_a_page_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor_files, "editor_package", lambda: None)
    page, file = answers(tmp_path, "/editor/", "/editor/assets/index-1.js")
    assert page[:2] == (200, "text/html")
    assert "run <code>pip install ./lorasmith-editor</code>" in page[2]
    assert "or <code>pip install &quot;lorasmith[editor]&quot;</code>" in page[2]
    assert file[0] == 404


@needs_editor
def test_extensions_and_templates_are_where_the_editor_looks(tmp_path: Path) -> None:
    async def ask() -> tuple[Any, ...]:
        async with serving(tmp_path) as server:
            extensions = await server.get("/editor/api/extensions")
            script = await server.get(f"/editor{extensions[0]}")
            index = await server.get("/editor/templates/index.json")
            graphs = [
                await server.get(f"/editor/templates/{one['name']}.json")
                for group in index
                for one in group["templates"]
            ]
            await server.get("/editor/templates/no_such_template.json", status=404)
            return extensions, script, index, graphs

    extensions, script, index, graphs = asyncio.run(ask())
    assert extensions[0] == "/extensions/lorasmith/lorasmith.js"
    assert 'from "../../scripts/app.js"' in script
    assert len(graphs) == sum(len(group["templates"]) for group in index) > 8
    assert all("TrainLoraNode" in [node["type"] for node in graph["nodes"]] for graph in graphs)
