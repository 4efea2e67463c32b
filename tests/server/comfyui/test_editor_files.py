from __future__ import annotations

import json
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lorasmith.core.folders import Folders
from lorasmith.server.comfyui.editor_files import EditorFiles
from tests.server.fake_server import FakeAssistant


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


async def test_extensions_templates_and_documentation(tmp_path: Path) -> None:
    ours, package = tmp_path / "ours", tmp_path / "package"
    put(ours / "extensions" / "lorasmith" / "a b.js", "ours")
    put(package / "extensions" / "core" / "x.js", "theirs")
    put(tmp_path / "secret.js", "secret")
    (ours / "extensions" / "link.js").symlink_to(tmp_path / "secret.js")
    app = web.Application()
    app.add_routes(EditorFiles(FakeAssistant(Folders(tmp_path)), ours=ours, package=package).routes())  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:

        async def get(path: str) -> tuple[int, str, str]:
            async with client.get(path) as answer:
                return answer.status, answer.content_type, await answer.text()

        async with client.get("/extensions") as answer:
            listed = await answer.json()
        assert {"/extensions/lorasmith/a%20b.js", "/extensions/core/x.js"} <= {*listed}
        assert await get("/extensions/lorasmith/a%20b.js") == (200, "text/javascript", "ours")
        assert (await get("/extensions/core/x.js"))[2] == "theirs"
        assert (await get("/extensions/link.js"))[0] == 403
        assert (await get("/extensions/..%2F..%2Fsecret.js"))[0] == 403
        assert (await get("/extensions/none.js"))[0] == 404
        status, kind, text = await get("/templates/single_subject.json")
        assert (status, kind) == (200, "application/json") and "nodes" in json.loads(text)
        assert (await get("/templates/none.json"))[0] == 404
        assert await get("/docs/Number/en.md") == (200, "text/markdown", "# Number")
        assert (await get("/docs/Number/fr.md"))[0] == 404
        assert (await get("/docs/None/en.md"))[0] == 404
